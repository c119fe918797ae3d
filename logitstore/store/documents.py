"""Documents of a store, indexed by number: their lengths, their digests, and one value for each of their rows.

In shapes, D is the number of documents, S the number of shards, R the number of rows of a shard, and T the number of
tokens of a document.
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
    """The lengths and digests of the visible documents of an open store, in order. Tokens are not included.

    A document that was set aside in a layer keeps its number, its length and its digest.
    """

    lengths: NDArray[np.int64]
    """[D]: number of tokens of each document, at least 1."""
    digests: NDArray[np.uint64]
    """[D]: digest of each document's ids and loss mask; documents of equal content have equal digests. The digests are
    uniformly distributed over 64 bits. A document has the same digest in every store, and keeps it after appends."""
    first_document: NDArray[np.int64]
    """[S + 1]: shard s holds the documents with numbers from first_document[s] to first_document[s + 1] - 1."""

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def documents_per_shard(self) -> NDArray[np.int64]:
        """[S]: number of documents in each shard, in order."""
        return np.diff(self.first_document)


class RowValues:
    """Losses or loss gaps by document, in nats.

    `values[17]` is a float32 array [T] with one value for each token of document 17. Values are NaN where the loss mask
    is 0.
    """

    def __init__(
        self,
        num_documents: int,
        locate: Callable[[int], tuple[int, int]],
        starts: Callable[[int], NDArray[np.int64]],
        read: Callable[[int], NDArray[np.float32]],
    ) -> None:
        """Stores the functions that read the values. Each value is read when it is asked for.

        Args:
            num_documents: Number of documents in the store.
            locate: Takes the number of a document. Returns the number of the document's shard, and the document's place
                in that shard, counting from 0.
            starts: Takes the number of a shard. Returns int64 [number of documents in the shard + 1]: the first row of
                each document, then the number of rows of the shard.
            read: Takes the number of a shard. Returns the values of the shard, float32 [R].
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
