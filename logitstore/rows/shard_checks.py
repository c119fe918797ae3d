"""Checks that the values of a shard are possible. A hostile store may hold impossible values with correct checksums.

In shapes, R is the number of rows.
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
"""Maximum amount in nats by which rounding may raise a logprob above 0, or lower an entropy or a loss below 0."""


def check_lengths(spec: StoreSpec, commit: Commit, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Checks that the lengths of the documents in a shard of `tokens` are possible.

    Args:
        spec: Spec of the store.
        commit: Commit record of the shard.
        arrays: Stored arrays by name; only `lengths` is used.

    Raises:
        DamagedShardError: A length is out of range, or the lengths do not add up to `commit.rows`.
    """
    lengths = arrays["lengths"].astype(np.int64)
    if (num_rows := int(lengths.sum())) != commit.rows:
        raise DamagedShardError("tokens", commit.shard, f"lengths that add up to {num_rows} rows, not {commit.rows}")
    if lengths.min(initial=1) < 1 or lengths.max(initial=0) > spec.max_length:
        raise DamagedShardError(
            "tokens", commit.shard, f"a document with a length outside 1 to {spec.max_length} tokens"
        )


def check_tokens(spec: StoreSpec, commit: Commit, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Checks that the values of a shard of `tokens` are possible.

    Args:
        spec: Spec of the store.
        commit: Commit record of the shard.
        arrays: Stored arrays by name, without padding.

    Raises:
        DamagedShardError: A length, a token id or the loss mask is impossible.
    """
    check_lengths(spec, commit, arrays)
    lengths = arrays["lengths"].astype(np.int64)
    mask = arrays["loss_mask"]
    if arrays["ids"].max(initial=0) >= spec.tokenizer.vocab_size:
        raise DamagedShardError("tokens", commit.shard, "token ids beyond the vocabulary")
    counted = int(mask.sum(dtype=np.int64))
    # No token follows the last row of a document, so the last row has no prediction that could count.
    if mask.max(initial=0) > 1 or mask[np.cumsum(lengths) - 1].any() or counted != commit.counted:
        reason = (
            "a loss mask with values other than 0 and 1, with 1 at a document's last row, or with another number of "
            f"ones than {commit.counted}"
        )
        raise DamagedShardError("tokens", commit.shard, reason)


def check_target(spec: StoreSpec, commit: Commit, arrays: Mapping[str, NDArray[Any]], mask: NDArray[np.bool_]) -> None:
    """Checks that the values of a shard of `target` are possible.

    Args:
        spec: Spec of the store, with the spec of the target layer.
        commit: Commit record of the shard.
        arrays: Stored arrays by name, without padding.
        mask: [R]: whether each row counts; False in documents that were set aside.

    Raises:
        DamagedShardError: A row that counts has no entries, a row that does not count has entries, or a value is out of
            range.
    """
    _check_counted(commit, mask)
    counts = arrays["counts"]
    if len(counts) != len(mask) or int(counts.sum(dtype=np.int64)) != commit.entries:
        reason = f"counts that do not add up to {commit.entries} entries at {len(mask)} rows"
        raise DamagedShardError("target", commit.shard, reason)
    if ((counts > 0) != mask).any() or counts.max(initial=0) > entries_per_row(spec, "target"):
        reason = "counts that are 0 at a row that counts, above 0 at a row that does not, or too large"
        raise DamagedShardError("target", commit.shard, reason)
    # Token ids rise within a row, so the last id is the largest, and the other ids need not be decoded.
    if codec.last_ids(arrays["gaps"], counts).max(initial=0) >= spec.tokenizer.vocab_size:
        raise DamagedShardError("target", commit.shard, "token ids beyond the vocabulary")
    _check_draws(spec, commit, arrays)
    for name in ("tail", "label_logprob"):
        _check_floats("target", commit, name, arrays[name], mask, most=SLACK_NATS)
    _check_floats("target", commit, "entropy", arrays["entropy"], mask, least=-SLACK_NATS)


def _check_draws(spec: StoreSpec, commit: Commit, arrays: Mapping[str, NDArray[Any]]) -> None:
    if spec.target is None or spec.target.scheme.name != "sample":
        return  # Other schemes store no draws: `decode_layer` filled in zeros, and checked the checksum of the zeros.
    num_draws, draws = spec.target.scheme.num_draws, arrays["draws"].astype(np.int64)
    kept = arrays["counts"][arrays["counts"] > 0].astype(np.int64)
    if draws.min(initial=1) < 1 or (np.add.reduceat(draws, np.cumsum(kept) - kept) != num_draws).any():
        reason = f"draws that are 0 or do not add up to {num_draws} at each row that counts"
        raise DamagedShardError("target", commit.shard, reason)


def check_losses(commit: Commit, arrays: Mapping[str, NDArray[Any]], mask: NDArray[np.bool_]) -> None:
    """Checks that the values of a shard of `losses/<name>` are possible.

    Args:
        commit: Commit record of the shard.
        arrays: Stored arrays by name, without padding.
        mask: [R]: whether each row counts; False in documents that were set aside.

    Raises:
        DamagedShardError: A value is out of range, or exists at a row that does not count.
    """
    _check_counted(commit, mask)
    _check_floats(commit.layer, commit, "ce", arrays["ce"], mask, least=-SLACK_NATS)
    _check_floats(commit.layer, commit, "label_logprob", arrays["label_logprob"], mask, most=SLACK_NATS)


def _check_counted(commit: Commit, mask: NDArray[np.bool_]) -> None:
    if (counted := int(mask.sum())) != commit.counted:
        reason = f"a commit record with counted={commit.counted}, although the loss mask counts {counted} rows"
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
        raise DamagedShardError(
            layer, commit.shard, f"{name} with the wrong number of rows, or with a value at a row that does not count"
        )
    # Comparisons with NaN are false, so NaN is refused too.
    if not ((values[mask] >= least) & (values[mask] <= most)).all():
        raise DamagedShardError(layer, commit.shard, f"{name} that is NaN or out of range at a row that counts")
