"""One shard of a store in memory, and whether what was read of it can be what was committed.

R rows, D documents, E entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from logitstore import codec, commits, layout, objects
from logitstore.errors import DamagedShardError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from logitstore.commits import Commit
    from logitstore.rows import Rows
    from logitstore.spec import StoreSpec

MAX_COMMIT_BYTES = 2**22
SLACK_NATS = 1e-3
"""By how much rounding may push a logprob above 0, or an entropy below."""


@dataclass(frozen=True, kw_only=True)
class Document:
    """One document of T tokens."""

    ids: NDArray[np.uint32]
    """[T]"""
    loss_mask: NDArray[np.bool_]
    """[T]: whether the prediction made at this row, of the next token, counts. Never at the last."""
    rows: Rows | None
    """The target's T rows; None in a store that has no target layer."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """The documents of one shard, end to end, R rows in all."""

    index: int
    ids: NDArray[np.uint32]
    """[R]"""
    loss_mask: NDArray[np.bool_]
    """[R]. All 0 in documents that were set aside in a layer that was read."""
    lengths: NDArray[np.int64]
    """[D]: tokens of each document."""
    tokens_digest: str
    """Identity of ids, mask and lengths."""
    rows: Rows | None
    """The target's rows, None where they were not asked for."""
    target_digest: str | None
    """Identity of the rows."""
    losses: dict[str, NDArray[np.float32]]
    """[R] each: soft cross entropy by model name, NaN where masked."""

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """[D + 1]: document i has rows starts[i]..starts[i + 1]."""
        starts = np.zeros(len(self.lengths) + 1, dtype=np.int64)
        np.cumsum(self.lengths, out=starts[1:])
        return starts

    def __len__(self) -> int:
        return len(self.lengths)

    def document(self, i: int) -> Document:
        """Returns document i of this shard; views, no copies."""
        start, stop = int(self.starts[i]), int(self.starts[i + 1])
        return Document(
            ids=self.ids[start:stop],
            loss_mask=self.loss_mask[start:stop],
            rows=None if self.rows is None else self.rows.slice(start, stop),
        )


class Part(NamedTuple):
    """A shard of a layer, or some of its arrays."""

    layer: str
    shard: int
    arrays: frozenset[str] | None = None
    """Names; None for all."""


def entries_per_row(spec: StoreSpec, layer: str) -> int:
    """Returns the room of a row in the arrays of a layer that are numbered per entry; 1 where there are none."""
    return spec.target.room if layer == "target" and spec.target else 1


def _chosen(layer: str, arrays: frozenset[str] | None) -> list[layout.ArraySpec]:
    """Returns the arrays of a layer that are asked for: all, where no names are given."""
    return [array for array in layout.layer_arrays(layer) if arrays is None or array.name in arrays]


def _have_objects(spec: StoreSpec, arrays: list[layout.ArraySpec]) -> list[layout.ArraySpec]:
    """Leaves out arrays that can have no objects: a bucket need not be asked for draws that no scheme made."""
    is_sampled = spec.target is not None and spec.target.scheme.name == "sample"
    return [array for array in arrays if array.name != "draws" or is_sampled]


def paths(spec: StoreSpec, part: Part) -> tuple[list[str], list[int]]:
    """Returns where the objects of a part of a store are, and how long each may be."""
    found = _have_objects(spec, _chosen(part.layer, part.arrays))
    sizes = {"shard_rows": spec.shard_rows, "k": entries_per_row(spec, part.layer)}
    return (
        [layout.object_path(part.layer, array, part.shard) for array in found],
        [objects.most_bytes(array, **sizes) for array in found],
    )


def check_room(spec: StoreSpec, commit: Commit) -> None:
    """Checks that a shard has room for what was committed.

    Raises:
        DamagedShardError: It has not.
    """
    for array in layout.layer_arrays(commit.layer):
        num = commits.length(commit, array.per)
        if num > layout.capacity(array, spec.shard_rows, entries_per_row(spec, commit.layer)):
            raise DamagedShardError(
                commit.layer, commit.shard, f"a commit record of {num} values per {array.per}, more than there is room"
            )


def decode_layer(
    spec: StoreSpec, commit: Commit, data: list[bytes | None], arrays: frozenset[str] | None = None
) -> dict[str, NDArray[Any]]:
    """Turns the objects of a shard into its arrays, without padding, and checks them against its commit.

    Args:
        spec: Of the store.
        commit: The shard's record.
        data: Its objects in the order of `paths`, None for those that are not there.
        arrays: Which were read; all by default.

    Raises:
        DamagedShardError: What is stored is not what was committed.
    """
    check_room(spec, commit)
    layer, shard = commit.layer, commit.shard
    k, chosen = entries_per_row(spec, layer), _chosen(layer, arrays)
    objects_of = dict(zip((array.name for array in _have_objects(spec, chosen)), data, strict=True))
    values = {}
    for array in chosen:
        num, found = commits.length(commit, array.per), objects_of.get(array.name)
        try:
            values[array.name] = objects.decode(found, num, array, shard_rows=spec.shard_rows, k=k)
        except ValueError as error:
            raise DamagedShardError(layer, shard, f"{array.name} that cannot be decoded ({error})") from error
        if (checksum := commits.checksum(values[array.name])) != commit.checksums[array.name]:
            absent = ", its object is not there," if found is None and array.name in objects_of else ""
            raise DamagedShardError(
                layer, shard, f"{array.name}{absent} with checksum {checksum}, not {commit.checksums[array.name]}"
            )
    return values


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


def without(mask: NDArray[np.bool_], lengths: NDArray[np.int64], commit: Commit) -> NDArray[np.bool_]:
    """Returns a mask that is 0 in the documents that a commit set aside.

    Raises:
        DamagedShardError: There are no such documents.
    """
    if not commit.set_aside:
        return mask
    if max(commit.set_aside) >= len(lengths):
        raise DamagedShardError(commit.layer, commit.shard, "documents set aside that are not there")
    kept = np.ones(len(lengths), dtype=bool)
    kept[list(commit.set_aside)] = False
    remaining: NDArray[np.bool_] = mask & np.repeat(kept, lengths)
    return remaining
