"""Reader that loads shards on a thread before they are needed."""

from __future__ import annotations

import copy
import os
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Future

    from logitstore import Store
    from logitstore.rows.shard import Shard


class ShardPrefetcher:
    """Reader of shards. One thread reads and decodes them before they are needed.

    The most recently requested shards stay in memory.

    Attributes:
        pid: Id of the process that made this reader. The reader works only in this process.
    """

    def __init__(self, stores: Sequence[Store], layers: Sequence[str], capacity: int) -> None:
        """Makes the thread. Nothing is read before the first call of `get`.

        Args:
            stores: The open stores. They may have been opened in another process.
            layers: Names of the layers that are read from each shard.
            capacity: Maximum number of shards in memory, including shards that are being read.
        """
        self.pid = os.getpid()
        # fsspec's asynchronous file systems do not work after a fork. A deep copy of a store opens new ones.
        self._stores = copy.deepcopy(tuple(stores))
        self._layers = tuple(layers)
        self._capacity = capacity
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shards")
        self._shards: OrderedDict[tuple[int, int], Future[Shard]] = OrderedDict()

    def get(self, store: int, shard: int, soon: Sequence[tuple[int, int]] = ()) -> Shard:
        """Returns a shard, and starts to read the shards that will be requested next.

        Args:
            store: Number of the store.
            shard: Number of the shard in that store.
            soon: (store, shard) pairs that will be requested next, in this order.

        Raises:
            LogitStoreError: The requested shard cannot be read. If a shard of `soon` cannot be read, the error is
                raised when that shard is requested.
        """
        requested = dict.fromkeys([(store, shard), *soon])
        # Requested shards that are in memory become the most recent ones, so that the loop below drops others first.
        for key in requested:
            if key in self._shards:
                self._shards.move_to_end(key)
        for key in requested:
            if key not in self._shards:
                self._shards[key] = self._thread.submit(self._read, *key)
                if len(self._shards) > self._capacity:
                    # A read that has begun cannot be cancelled; its result is dropped.
                    _, oldest = self._shards.popitem(last=False)
                    oldest.cancel()
        return self._shards[store, shard].result()

    def _read(self, store: int, shard: int) -> Shard:
        return self._stores[store].read_shard(shard, layers=self._layers)

    def close(self) -> None:
        """Frees the shards and cancels the reads that have not begun. A read that has begun still finishes."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._shards.clear()
