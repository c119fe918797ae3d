"""A shard and a document of a store in memory. NumPy only.

In shapes, R is the number of rows, D the number of documents, and T the number of tokens of one document.
"""

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
    """[T]: token ids."""
    loss_mask: NDArray[np.bool_]
    """[T]: whether the prediction of the next token at each row counts; always False at the last row."""
    rows: Rows | None
    """The T rows of the target layer; None if the shard was read without the target layer."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """The documents of one shard, laid end to end."""

    index: int
    """Number of the shard, from 0."""
    ids: NDArray[np.uint32]
    """[R]: token ids."""
    loss_mask: NDArray[np.bool_]
    """[R]: whether each row counts. False at all rows of a document that was set aside in any layer that was read."""
    lengths: NDArray[np.int64]
    """[D]: number of tokens of each document."""
    tokens_digest: str
    """Digest of the shard in the `tokens` layer."""
    rows: Rows | None
    """The R rows of the target layer; None if the target layer was not read."""
    target_digest: str | None
    """Digest of the shard in the `target` layer; None if the target layer was not read."""
    losses: dict[str, NDArray[np.float32]]
    """Losses [R] by model name: soft cross entropy in nats, NaN at rows that do not count in the model's layer."""

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Int64 [D + 1]: document i has the rows starts[i] up to, not including, starts[i + 1]."""
        starts = np.zeros(len(self.lengths) + 1, dtype=np.int64)
        np.cumsum(self.lengths, out=starts[1:])
        return starts

    def __len__(self) -> int:
        return len(self.lengths)

    def document(self, i: int) -> Document:
        """Returns document `i` of this shard. The arrays of the document are views, not copies."""
        start, stop = int(self.starts[i]), int(self.starts[i + 1])
        return Document(
            ids=self.ids[start:stop],
            loss_mask=self.loss_mask[start:stop],
            rows=None if self.rows is None else self.rows.slice(start, stop),
        )


def without_set_aside(mask: NDArray[np.bool_], lengths: NDArray[np.int64], commit: Commit) -> NDArray[np.bool_]:
    """Returns a loss mask that is False at all rows of the documents that a commit record sets aside.

    Args:
        mask: [R]: loss mask of the shard.
        lengths: [D]: number of tokens of each document.
        commit: Commit record of the shard in any layer.

    Raises:
        DamagedShardError: The commit record sets aside a document that the shard does not have.
    """
    if not commit.set_aside:
        return mask
    if max(commit.set_aside) >= len(lengths):
        reason = (
            f"a commit record that sets aside document {max(commit.set_aside)}, but the last one is {len(lengths) - 1}"
        )
        raise DamagedShardError(commit.layer, commit.shard, reason)
    # The choice is made by document, then repeated for each row of the document.
    kept = np.ones(len(lengths), dtype=bool)
    kept[list(commit.set_aside)] = False
    remaining: NDArray[np.bool_] = mask & np.repeat(kept, lengths)
    return remaining
