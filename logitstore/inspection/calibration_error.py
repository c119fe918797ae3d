"""How calibrated the target's likeliest token is, as the store has it: a draft that learns the rows learns that too.

NumPy only. N rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from logitstore.store.reader import Store

NUM_BINS = 15
"""Of confidence, equally wide: as usual since arXiv 1706.04599."""


def expected_calibration_error(confidence: NDArray[np.float64], is_right: NDArray[np.bool_]) -> float:
    """Computes the mean over rows of |how often - how sure|, within bins of confidence (arXiv 1706.04599, equation 3).

    Args:
        confidence: [N]: probability of the likeliest token, in [0, 1].
        is_right: [N]: whether that token is the one that followed.

    Returns:
        In [0, 1]; 0 is calibrated.
    """
    bins = np.minimum((confidence * NUM_BINS).astype(np.intp), NUM_BINS - 1)
    return float(np.abs(np.bincount(bins, is_right - confidence, NUM_BINS)).sum() / len(confidence))


def measure(store: Store, shards: Sequence[int]) -> dict[str, Any]:
    """Measures it on the rows of some shards.

    Args:
        store: Whose rows are truncated: they alone are sure to keep the likeliest token.
        shards: Committed ones.

    Returns:
        `rows`; if there are any also `accuracy`, how often the likeliest token follows, `ece`, and
        `ece_renormalised`: the same where the tail is dropped and the kept entries are scaled up to 1.

    Raises:
        DamagedShardError: A shard is not as committed.
    """
    parts = [_likeliest(store, shard) for shard in shards]
    if not sum(len(highest) for highest, _, _ in parts):
        return {"rows": 0}
    highest, mass, is_right = (np.concatenate(column) for column in zip(*parts, strict=True))
    return {
        "rows": len(highest),
        "accuracy": float(is_right.mean()),
        "ece": expected_calibration_error(highest, is_right),
        "ece_renormalised": expected_calibration_error(np.minimum(highest / mass, 1.0), is_right),
    }


def _likeliest(store: Store, shard: int) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """Returns the likeliest entry's probability, the kept mass and whether the entry follows, of rows that count."""
    read = store.read_shard(shard, layers=("target",))
    rows = read.rows
    if rows is None or not len(rows.token_ids):
        return np.zeros(0), np.zeros(0), np.zeros(0, dtype=bool)
    counted = np.flatnonzero(read.loss_mask)
    counts = rows.counts[counted]
    first = np.cumsum(counts) - counts
    probs = np.exp(rows.logprobs.astype(np.float64))
    highest = np.maximum.reduceat(probs, first)
    # 0 if it is none of them; of entries that are equally likely any may be the one
    is_label = rows.token_ids == np.repeat(read.ids[counted + 1], counts)
    of_label = np.add.reduceat(np.where(is_label, probs, 0.0), first)
    return highest, np.add.reduceat(probs, first), of_label == highest
