"""Measures the calibration of the target's likeliest token on stored rows.

A draft that is trained on these rows learns their calibration too. Uses only NumPy. N: number of rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from logitstore.store.reader import Store

NUM_BINS = 15
"""Number of bins of equal width into which rows are divided by confidence. arXiv 1706.04599 uses 15 bins too."""


def expected_calibration_error(confidence: NDArray[np.float64], is_right: NDArray[np.bool_]) -> float:
    """Computes the expected calibration error (arXiv 1706.04599, equation 3).

    Rows are divided into bins by confidence. The error is the mean of |accuracy - mean confidence| over the bins,
    weighted by their numbers of rows.

    Args:
        confidence: [N], N at least 1: probability of the likeliest token, in [0, 1].
        is_right: [N]: whether the likeliest token is the next token of the document.

    Returns:
        The error, in [0, 1]; 0 means perfectly calibrated.
    """
    # A confidence of exactly 1 belongs to the last bin.
    bins = np.minimum((confidence * NUM_BINS).astype(np.intp), NUM_BINS - 1)
    # The sizes of the bins cancel: a bin of n rows adds n / N * |sum of differences / n|.
    return float(np.abs(np.bincount(bins, is_right - confidence, NUM_BINS)).sum() / len(confidence))


def measure(store: Store, shards: Sequence[int]) -> dict[str, Any]:
    """Measures how accurate and how well calibrated the likeliest token is, on the rows of some shards.

    Args:
        store: An open store with truncated rows. Stores with drawn entries cannot be measured, because a row may lack
            its likeliest token.
        shards: Numbers of committed target shards.

    Returns:
        `rows`: number of rows whose loss mask is 1. If `rows` is 0, the other keys are absent.
        `accuracy`: share of rows whose likeliest token is the next token of the document;
        `ece`: expected calibration error, in [0, 1];
        `ece_renormalised`: the same error after the tail is dropped and the kept probabilities are scaled to sum to 1.

    Raises:
        DamagedShardError: A shard differs from what was committed.
        IdentityError: A shard was computed from other tokens than the store holds now.
        LayerNotFoundError: A shard is not committed.
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
    """Reads a shard, and finds the likeliest entry of each of the N rows whose loss mask is 1.

    Returns:
        Three arrays [N]: the probability of the likeliest entry, the sum of the kept probabilities, and whether the
        likeliest entry is the next token of the document.
    """
    read = store.read_shard(shard, layers=("target",))
    rows = read.rows
    if rows is None or not len(rows.token_ids):
        return np.zeros(0), np.zeros(0), np.zeros(0, dtype=bool)
    counted = np.flatnonzero(read.loss_mask)
    counts = rows.counts[counted]
    first = np.cumsum(counts) - counts
    probs = np.exp(rows.logprobs.astype(np.float64))
    highest = np.maximum.reduceat(probs, first)
    # The loss mask is 0 at the last row of a document, so the row after a counted one holds the token that follows. The
    # probability of that token counts as 0 if it is not a kept entry. If several entries share the highest probability,
    # each of them counts as the likeliest.
    is_label = rows.token_ids == np.repeat(read.ids[counted + 1], counts)
    of_label = np.add.reduceat(np.where(is_label, probs, 0.0), first)
    return highest, np.add.reduceat(probs, first), of_label == highest
