"""One float per row of a store, by document."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from logitstore.reader import Store


class RowValues:
    """Losses or gaps: `values[17]` is float32 [T], NaN where the loss mask is 0."""

    def __init__(self, store: Store, read: Callable[[int], NDArray[np.float32]]) -> None:
        """Reads nothing yet.

        Args:
            store: Whose documents.
            read: Returns the values of a shard, float32 [R].
        """
        self._store = store
        self._read = read

    def __len__(self) -> int:
        return self._store.num_documents

    def __getitem__(self, document: int) -> NDArray[np.float32]:
        shard, place = self._store.locate(document)
        starts = self._store.shard(shard, layers=("tokens",)).starts
        return self._read(shard)[starts[place] : starts[place + 1]]
