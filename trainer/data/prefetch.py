"""Reads shards ahead on a thread."""

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
    """Shards of some stores, read and decoded ahead by one thread, the last few kept: of one process."""

    def __init__(self, stores: Sequence[Store], layers: Sequence[str], capacity: int) -> None:
        """Reads nothing yet.

        Args:
            stores: Opened in any process.
            layers: What is read of each shard.
            capacity: Shards that are kept, and read ahead, at most.
        """
        self.pid = os.getpid()
        # fsspec's asynchronous file systems refuse to work in a forked process: a copy opens its own
        self._stores = copy.deepcopy(tuple(stores))
        self._layers = tuple(layers)
        self._capacity = capacity
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shards")
        self._shards: OrderedDict[tuple[int, int], Future[Shard]] = OrderedDict()

    def get(self, store: int, shard: int, soon: Sequence[tuple[int, int]] = ()) -> Shard:
        """Returns a shard, and has others read meanwhile.

        Args:
            store: Which store.
            shard: Which of its shards.
            soon: Stores and shards that will be asked for, in order.

        Raises:
            LogitStoreError: This shard cannot be read. What befalls the others is told when they are asked for.
        """
        wanted = dict.fromkeys([(store, shard), *soon])
        for key in wanted:
            if key in self._shards:
                self._shards.move_to_end(key)
        for key in wanted:
            if key not in self._shards:
                self._shards[key] = self._thread.submit(self._read, *key)
                if len(self._shards) > self._capacity:
                    _, oldest = self._shards.popitem(last=False)
                    oldest.cancel()
        return self._shards[store, shard].result()

    def _read(self, store: int, shard: int) -> Shard:
        return self._stores[store].read_shard(shard, layers=self._layers)

    def close(self) -> None:
        """Reads no more than the shard that is under way."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._shards.clear()
