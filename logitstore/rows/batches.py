"""The documents of a shard in padded batches: what every forward of a model over a store runs on. NumPy only.

N rows that count, B batch, T tokens.
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
    """Some documents of a shard, right-padded, and which of their rows count."""

    ids: NDArray[np.int64]
    """[B, T]: 0 beyond a document's end; nothing under causal attention looks there."""
    places: NDArray[np.intp]
    """[N]: rows that count, as places in the flattened batch."""
    labels: NDArray[np.int64]
    """[N]: the token that really follows."""
    rows: NDArray[np.intp]
    """[N]: the same rows, as places in the shard."""


def plan_batches(lengths: NDArray[np.int64], batch_tokens: int) -> list[NDArray[np.intp]]:
    """Groups documents of like length, longest first, so that padding is rare and memory is tried out at once.

    Args:
        lengths: Tokens of each document.
        batch_tokens: Most tokens of a batch, padding included; a longer document is a batch of its own.

    Returns:
        Document numbers of each batch. The same for the same lengths, whatever ran before.
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
    """Lays out the documents of a shard in batches, for a forward of a model. NumPy only.

    Args:
        shard: Tokens of the documents.
        batch_tokens: Most tokens of a batch, padding included; a longer document is a batch of its own.

    Yields:
        Every row that counts, once. Documents without such a row are left out.
    """
    counted = np.add.reduceat(shard.loss_mask, shard.starts[:-1], dtype=np.int64) > 0
    documents = np.flatnonzero(counted)
    for chosen in plan_batches(shard.lengths[documents], batch_tokens):
        members = documents[chosen]
        longest = int(shard.lengths[members].max())
        # One [B, T] table of shard rows serves ids, mask and places alike.
        columns = np.arange(longest)
        real = columns < shard.lengths[members][:, None]
        table = np.where(real, shard.starts[members][:, None] + columns, 0)
        places = np.flatnonzero(real & shard.loss_mask[table])
        rows = table.reshape(-1)[places]
        yield Batch(
            ids=np.where(real, shard.ids[table], 0).astype(np.int64),
            places=places,
            labels=shard.ids[rows + 1].astype(np.int64),
            rows=rows,
        )
