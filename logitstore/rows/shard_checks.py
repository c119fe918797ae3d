"""One shard of a store in memory, and whether what was read of it can be what was committed.

R rows, D documents, E entries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from logitstore.errors import DamagedShardError
from logitstore.rows import codec
from logitstore.rows.shard_arrays import entries_per_row

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from logitstore.format.commit import Commit
    from logitstore.format.spec import StoreSpec

SLACK_NATS = 1e-3
"""By how much rounding may push a logprob above 0, or an entropy below."""


def check_lengths(spec: StoreSpec, commit: Commit, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Checks that a shard of tokens is documents as far as their lengths tell.

    Raises:
        DamagedShardError: It is not.
    """
    lengths = arrays["lengths"].astype(np.int64)
    if (num_rows := int(lengths.sum())) != commit.rows:
        raise DamagedShardError("tokens", commit.shard, f"documents of {num_rows} rows in all, not {commit.rows}")
    if lengths.min(initial=1) < 1 or lengths.max(initial=0) > spec.max_length:
        raise DamagedShardError("tokens", commit.shard, f"a document that is not of 1 to {spec.max_length} tokens")


def check_tokens(spec: StoreSpec, commit: Commit, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Checks that tokens are documents: what was committed may have been wrong, or made to be.

    Raises:
        DamagedShardError: They are not.
    """
    check_lengths(spec, commit, arrays)
    lengths = arrays["lengths"].astype(np.int64)
    mask = arrays["loss_mask"]
    if arrays["ids"].max(initial=0) >= spec.tokenizer.vocab_size:
        raise DamagedShardError("tokens", commit.shard, "token ids beyond the vocabulary")
    counted = int(mask.sum(dtype=np.int64))
    if mask.max(initial=0) > 1 or mask[np.cumsum(lengths) - 1].any() or counted != commit.counted:
        raise DamagedShardError("tokens", commit.shard, f"a loss mask that is not one of {commit.counted} rows")


def check_target(spec: StoreSpec, commit: Commit, arrays: Mapping[str, NDArray[Any]], mask: NDArray[np.bool_]) -> None:
    """Checks that values are rows: entries where `mask` is 1, numbers that can be such.

    Raises:
        DamagedShardError: They are not.
    """
    _check_counted(commit, mask)
    counts = arrays["counts"]
    if len(counts) != len(mask) or int(counts.sum(dtype=np.int64)) != commit.entries:
        raise DamagedShardError("target", commit.shard, "counts that do not add up to its entries")
    if ((counts > 0) != mask).any() or counts.max(initial=0) > entries_per_row(spec, "target"):
        raise DamagedShardError("target", commit.shard, "counts that are not those of the rows that count")
    if codec.last_ids(arrays["gaps"], counts).max(initial=0) >= spec.tokenizer.vocab_size:
        raise DamagedShardError("target", commit.shard, "token ids beyond the vocabulary")
    _check_draws(spec, commit, arrays)
    for name in ("tail", "label_logprob"):
        _check_floats("target", commit, name, arrays[name], mask, most=SLACK_NATS)
    _check_floats("target", commit, "entropy", arrays["entropy"], mask, least=-SLACK_NATS)


def _check_draws(spec: StoreSpec, commit: Commit, arrays: Mapping[str, NDArray[Any]]) -> None:
    if spec.target is None or spec.target.scheme.name != "sample":
        return  # there are none: what is not read is 0, and has the checksum of that
    num_draws, draws = spec.target.scheme.num_draws, arrays["draws"].astype(np.int64)
    kept = arrays["counts"][arrays["counts"] > 0].astype(np.int64)
    if draws.min(initial=1) < 1 or (np.add.reduceat(draws, np.cumsum(kept) - kept) != num_draws).any():
        raise DamagedShardError("target", commit.shard, f"draws that are not {num_draws} at each row")


def check_losses(commit: Commit, arrays: Mapping[str, NDArray[Any]], mask: NDArray[np.bool_]) -> None:
    """Checks that values are losses: numbers that can be such where `mask` is 1.

    Raises:
        DamagedShardError: They are not.
    """
    _check_counted(commit, mask)
    _check_floats(commit.layer, commit, "ce", arrays["ce"], mask, least=-SLACK_NATS)
    _check_floats(commit.layer, commit, "label_logprob", arrays["label_logprob"], mask, most=SLACK_NATS)


def _check_counted(commit: Commit, mask: NDArray[np.bool_]) -> None:
    if (counted := int(mask.sum())) != commit.counted:
        reason = f"a commit record with counted={commit.counted}, not {counted}"
        raise DamagedShardError(commit.layer, commit.shard, reason)


def _check_floats(
    layer: str,
    commit: Commit,
    name: str,
    values: NDArray[np.float32],
    mask: NDArray[np.bool_],
    *,
    least: float = -np.inf,
    most: float = float(np.finfo(np.float32).max),
) -> None:
    if len(values) != len(mask) or not np.isnan(values[~mask]).all():
        raise DamagedShardError(layer, commit.shard, f"{name} where no row counts")
    # NaN compares as false
    if not ((values[mask] >= least) & (values[mask] <= most)).all():
        raise DamagedShardError(layer, commit.shard, f"{name} that cannot be one")
