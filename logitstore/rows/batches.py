"""Padded batches of the documents of a shard. Every model that reads a store runs on these batches. NumPy only.

Rows count if their loss mask is 1. In shapes, B is the number of documents of a batch, T is the padded length in tokens
of these documents, and N is the number of rows of the batch that count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from logitstore.rows.shard import Shard


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Some documents of a shard, right-padded, and their rows that count (loss mask 1)."""

    ids: NDArray[np.int64]
    """[B, T]: token ids; 0 beyond the end of a document. Under causal attention no row of a document
    depends on the padding."""
    places: NDArray[np.intp]
    """[N]: position of each row that counts, as an index into the flattened [B * T] batch."""
    labels: NDArray[np.int64]
    """[N]: for each row that counts, the id of the next token in the same document."""
    rows: NDArray[np.intp]
    """[N]: index in the shard of each row that counts."""


def plan_batches(lengths: NDArray[np.int64], batch_tokens: int) -> list[NDArray[np.intp]]:
    """Groups documents of similar length into batches, the longest documents first.

    Documents of similar length need little padding. Because the longest documents come first, a lack of memory shows in
    the first batch.

    Args:
        lengths: Number of tokens of each document.
        batch_tokens: Maximum number of tokens of a batch, padding included. A longer document gets its own batch.

    Returns:
        Indices of the documents of each batch. Equal arguments always give the same batches.
    """
    order = np.argsort(-lengths, kind="stable")
    batches = []
    start = 0
    while start < len(order):
        size = max(1, batch_tokens // int(lengths[order[start]]))
        batches.append(order[start : start + size])
        start += size
    return batches


def batches(shard: Shard, batch_tokens: int) -> Iterator[Batch]:
    """Lays out the documents of a shard in batches for the forward pass of a model.

    Args:
        shard: The shard; only its tokens and loss mask are used.
        batch_tokens: Maximum number of tokens of a batch, padding included. A longer document gets its own batch.

    Yields:
        Batches. Every row that counts is in exactly one batch. Documents in which no row counts are left out.
    """
    counted = np.add.reduceat(shard.loss_mask, shard.starts[:-1], dtype=np.int64) > 0
    documents = np.flatnonzero(counted)
    for chosen in plan_batches(shard.lengths[documents], batch_tokens):
        members = documents[chosen]
        longest = int(shard.lengths[members].max())
        # The ids, the mask and the places are all looked up with one [B, T] table of row indices in the shard.
        columns = np.arange(longest)
        real = columns < shard.lengths[members][:, None]
        table = np.where(real, shard.starts[members][:, None] + columns, 0)
        places = np.flatnonzero(real & shard.loss_mask[table])
        rows = table.reshape(-1)[places]
        # The last row of a document never counts, so row + 1 belongs to the same document.
        yield Batch(
            ids=np.where(real, shard.ids[table], 0).astype(np.int64),
            places=places,
            labels=shard.ids[rows + 1].astype(np.int64),
            rows=rows,
        )
