"""The documents of a store by number: their lengths and digests, and one value per row of each.

D documents, S shards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class DocumentIndex:
    """The lengths and digests of the documents that an open store shows, in order, without their tokens.

    Documents that a layer set aside keep their number, their length and their digest.
    """

    lengths: NDArray[np.int64]
    """[D]: number of tokens of each document, at least 1."""
    digests: NDArray[np.uint64]
    """[D]: digest of each document's ids and loss mask; documents of equal content have equal digests. Uniform over 64
    bits, and the same in every store and after appends."""
    first_document: NDArray[np.int64]
    """[S + 1]: shard s holds documents first_document[s]..first_document[s + 1]."""

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def documents_per_shard(self) -> NDArray[np.int64]:
        """[S]: number of documents in each shard, in order."""
        return np.diff(self.first_document)


class RowValues:
    """Losses or loss gaps by document: `values[17]` is float32 [T] of document 17, NaN where the loss mask is 0."""

    def __init__(
        self,
        num_documents: int,
        locate: Callable[[int], tuple[int, int]],
        starts: Callable[[int], NDArray[np.int64]],
        read: Callable[[int], NDArray[np.float32]],
    ) -> None:
        """Keeps the functions that read; reads nothing yet.

        Args:
            num_documents: Number of documents in the store.
            locate: Returns the shard of a document, and its place in that shard.
            starts: Returns the first row of each document of a shard, int64 [documents + 1].
            read: Returns the values of a shard, float32 [R].
        """
        self._num_documents = num_documents
        self._locate = locate
        self._starts = starts
        self._read = read

    def __len__(self) -> int:
        return self._num_documents

    def __getitem__(self, document: int) -> NDArray[np.float32]:
        shard, place = self._locate(document)
        starts = self._starts(shard)
        return self._read(shard)[starts[place] : starts[place + 1]]
