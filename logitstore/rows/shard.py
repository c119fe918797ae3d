"""One shard of a store, and one document, in memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from logitstore.errors import DamagedShardError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from logitstore.format.commit import Commit
    from logitstore.rows.rows import Rows


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


def without_set_aside(mask: NDArray[np.bool_], lengths: NDArray[np.int64], commit: Commit) -> NDArray[np.bool_]:
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
