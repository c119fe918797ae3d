"""What a store's documents are, by number, without their tokens: enough to plan what is read when, and by whom.

D documents, S shards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from logitstore import shards
from logitstore.shards import Part

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from logitstore.reader import Store

ARRAYS = frozenset({"lengths", "digests"})
SHARDS_AT_ONCE = 64
"""Shards that are asked for at once: a bucket answers all in the time of a few."""
ROWS_AT_ONCE = 2**24
"""Most rows that they have room for: 200 MB, if somebody made objects that fill it."""


@dataclass(frozen=True, kw_only=True)
class DocumentIndex:
    """The documents that an open store shows, in order.

    Documents that a layer set aside keep their number, their length and their digest.
    """

    lengths: NDArray[np.int64]
    """[D]: tokens of each, at least 1."""
    digests: NDArray[np.uint64]
    """[D]: identity of each one's ids and loss mask; documents of the same content share it. Uniform over 64 bits, and
    the same in every store and after appends."""
    first_document: NDArray[np.int64]
    """[S + 1]: shard s holds documents first_document[s]..first_document[s + 1]."""

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def documents_per_shard(self) -> NDArray[np.int64]:
        """[S]: how many documents each shard holds, in order."""
        return np.diff(self.first_document)


def read(store: Store) -> DocumentIndex:
    """Reads the index of a store: two small objects of each shard, and its record, which they are checked against.

    Raises:
        DamagedShardError: What is stored is not what was committed.
        LayerNotFoundError: A shard was taken back since the store was opened.
        IdentityError: A shard was made by another job than the store's.
    """
    lengths, digests = [np.empty(0, np.int64)], [np.empty(0, np.uint64)]
    size = max(1, min(SHARDS_AT_ONCE, ROWS_AT_ONCE // store.spec.shard_rows))
    for start in range(0, store.num_shards, size):
        parts = [Part("tokens", shard, ARRAYS) for shard in range(start, min(start + size, store.num_shards))]
        for arrays, commit in store.read_parts(parts):
            shards.check_lengths(store.spec, commit, arrays)
            lengths.append(arrays["lengths"].astype(np.int64))
            digests.append(arrays["digests"])
    first_document = np.zeros(store.num_shards + 1, dtype=np.int64)
    np.cumsum([len(part) for part in lengths[1:]], out=first_document[1:])
    return DocumentIndex(
        lengths=np.concatenate(lengths),
        digests=np.concatenate(digests),
        first_document=first_document,
    )
