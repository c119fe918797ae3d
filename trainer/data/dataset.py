"""Dataset that reads packs of documents from the shards of stores. Depends on NumPy and torch only.

`trainer.data.order` decides the order of the packs, this module reads them, and `trainer.data.collate` builds batches.

The dataset reads whole shards and keeps them decoded in memory. A shuffle window is a group of shards whose packs are
shuffled together. Each reading process keeps the shards of at most two shuffle windows. A shard of 2**18 rows with 20
entries each takes about 60 MB. A thread reads and decodes the next shards before they are needed, so that training does
not wait for a bucket or for decoding.

DataLoader workers (`--dataloader_num_workers`) do not help. A batch may need any shard of a window, so every worker
decodes every shard. Sending a batch to another process also takes longer than building the batch. On two cores, the
main process alone reads 700,000 rows/s from a folder and 250,000 rows/s from a bucket. With one worker, these rates are
130,000 and 90,000 rows/s.
The two drafts of the demo train on 8,000 and 20,000 rows/s, and workers slow this training down by 5 to 45 %
(benchmarks/bench_loader.py).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Dataset

from logitstore.format.layout import losses_layer
from trainer.data.collate import Collator, Sample
from trainer.data.compatible import check_alike, check_complete, check_losses_given
from trainer.data.order import MAX_WINDOW, ROWS, Pack, PackOrder
from trainer.data.prefetch import ShardPrefetcher

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from logitstore import Store
    from logitstore.rows.shard import Shard

LOSSES = ("reference_ce", "initial_ce")
"""Names of the columns of a batch that hold losses from the stores."""


class DocumentDataset(Dataset[list[Sample]]):
    """Dataset of the documents in stores whose dumps are finished. Each item is one pack of documents.

    Attributes:
        stores: The stores that are read.
        order: The packs of all stores, and the order of these packs in every epoch.
    """

    def __init__(
        self,
        stores: Sequence[Store],
        *,
        columns: Sequence[str] = (),
        losses: Mapping[str, str] | None = None,
        reads_target: bool = True,
        weights: Sequence[float] | None = None,
        packing: bool = False,
        pack_length: int | None = None,
        eval_fraction: float = 0.0,
        shuffle_window: int = MAX_WINDOW,
        seed: int = 0,
    ) -> None:
        """Checks the stores, and reads the lengths and digests of all documents.

        Args:
            stores: One or more open stores that `check_alike` accepts together.
            columns: Names of additional values that a batch holds for each row. Possible names: `reference_ce`,
                `initial_ce`, `target_entropy`, `random`.
            losses: Names of the stored losses, keyed by the column (`reference_ce` or `initial_ce`) that is read from
                them.
            reads_target: Whether batches hold the target's rows. If false, the stores need no target layer, unless
                `columns` contains `target_entropy`.
            weights: Number of times that an epoch reads the documents of each store; 1 each by default.
            packing: Whether several documents may share a pack.
            pack_length: Maximum number of tokens in a pack, used only with packing. None stands for the largest
                `max_length` of the stores.
            eval_fraction: Fraction of the documents to hold out, at least 0 and below 1. Each document's digest decides
                whether it is held out.
            shuffle_window: Number of shards whose packs are shuffled together, 1 to `MAX_WINDOW`.
            seed: Seed of the order, and of the column `random`.

        Raises:
            ValueError: A value is out of its range, or the stores cannot be trained on together.
            LayerNotFoundError: A store lacks a layer that is read, or some shards of this layer are not committed.
            IdentityError: Some shards of a layer are stale: the tokens or target rows that they were computed from have
                been replaced since.
            DamagedShardError: The stored lengths or digests of documents differ from those that were committed.
        """
        self.stores = tuple(stores)
        self.columns = tuple(columns)
        self._losses = {name: check_losses_given(name, losses or {}) for name in LOSSES if name in self.columns}
        # Two columns may be read from the same losses. The dict makes sure that their layer is listed only once.
        self._layers = tuple(
            dict.fromkeys(
                ["tokens"]
                + ["target"] * (reads_target or "target_entropy" in self.columns)
                + [losses_layer(name) for name in self._losses.values()]
            )
        )
        for store in self.stores:
            for name in self._losses.values():
                # An unknown name fails here with a message that lists the names of the store's losses.
                store.loss(name)
            for name in self._layers:
                check_complete(store, name)
        check_alike(self.stores, reads_target="target" in self._layers, losses=self._losses.values())
        if packing and pack_length is None:
            # No document is longer than its store's `max_length`, so every document fits into a pack.
            pack_length = max(store.spec.max_length for store in self.stores)
        self.order = PackOrder(
            [store.documents() for store in self.stores],
            weights=weights,
            packing=packing,
            pack_length=pack_length,
            eval_fraction=eval_fraction,
            shuffle_window=shuffle_window,
            seed=seed,
        )
        self._reads_target = reads_target
        # The reader holds the shards of two windows: the one in use, and the next one.
        self._capacity = 2 * shuffle_window
        self._reader: ShardPrefetcher | None = None

    def __len__(self) -> int:
        """Returns the number of packs in an epoch."""
        return self.order.packs_per_epoch

    def __getitem__(self, pack: Pack) -> list[Sample]:
        # A forked process inherits the reader, but not the reader's thread, so it makes a reader of its own.
        if self._reader is None or self._reader.pid != os.getpid():
            self._reader = ShardPrefetcher(self.stores, self._layers, self._capacity)
        shard = self._reader.get(pack.store, pack.shard, pack.soon)
        return [self._sample(shard, pack, document) for document in pack.documents]

    # A reader has a thread, which cannot be sent to another process. A DataLoader worker therefore makes its own
    # reader.

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_reader": None}

    def document(self, store: int, document: int) -> Sample:
        """Reads one document, whether it is held out or not.

        Args:
            store: Number of the store in `stores`.
            document: Number of the document in that store.

        Raises:
            IndexError: The store has no document of this number.
            LogitStoreError: The shard of the document cannot be read.
        """
        shard, _ = self.stores[store].locate(document)
        (sample,) = self[Pack(store=store, shard=shard, documents=(document,))]
        return sample

    def collator(self) -> Collator:
        """Returns the function that lays out packs of this dataset as a batch."""
        target = self.stores[0].spec.target
        return Collator(
            packing=self.order.packing,
            reads_target=self._reads_target,
            is_drawn=target is not None and target.scheme.draws,
            columns=self.columns,
        )

    def close(self) -> None:
        """Stops reading shards in this process, and frees the decoded shards."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _sample(self, shard: Shard, pack: Pack, document: int) -> Sample:
        """Takes one document of a pack, with its columns, from the decoded shard."""
        _, place = self.stores[pack.store].locate(document)
        some = slice(int(shard.starts[place]), int(shard.starts[place + 1]))
        found = shard.document(place)
        columns = {column: shard.losses[name][some] for column, name in self._losses.items()}
        if "target_entropy" in self.columns and found.rows is not None:
            columns["target_entropy"] = found.rows.entropy
        if "random" in self.columns:
            # A seed per document makes the numbers independent of the order of reading and of the rank.
            rng = np.random.default_rng([pack.seed, ROWS, pack.epoch, pack.store, document])
            columns["random"] = rng.random(len(found.ids), dtype=np.float32)
        return Sample(
            ids=found.ids,
            loss_mask=found.loss_mask,
            # The rows may have been read only for the column `target_entropy`.
            rows=found.rows if self._reads_target else None,
            columns=columns,
        )
