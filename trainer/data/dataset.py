"""Stores -> batches: reads packs of documents in the order of an epoch, and shards ahead of it.

`trainer.data.order` decides which packs come when, `trainer.data.collate` builds batches; this module reads shards.
NumPy and torch only.

Shards are read whole and stay decoded: those of two windows of the order at most, in each process that reads, some
60 MB each at 2**18 rows of 20 entries. A thread reads and decodes what comes next, so that neither a bucket's latency
nor decoding is waited for.

Workers (`--dataloader_num_workers`) do not help: each decodes every shard for itself, since a batch may need any of a
window, and handing over a batch costs more than laying it out. On two cores one process alone reads 700,000 rows/s from
a folder and 250,000 from a bucket, with a worker 130,000 and 90,000, where the demo's drafts train on 8,000 and 20,000
(benchmarks/bench_loader.py), which they slow down by 5 to 45 %.
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
"""Columns of a batch that are losses of the stores."""


class DocumentDataset(Dataset[list[Sample]]):
    """The documents of finished stores, by packs.

    Attributes:
        stores: What is read.
        order: Which packs there are, and when each is read.
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
        """Checks the stores, and reads the lengths of all documents.

        Args:
            stores: At least one, all of one kind.
            columns: What batches hold of each row besides: reference_ce, initial_ce, target_entropy, random.
            losses: The name of the stores' losses that reference_ce is, and initial_ce.
            reads_target: Whether batches hold the target's distributions; a store need not have any otherwise.
            weights: How many times the documents of each store come in an epoch; once by default.
            packing: Whether documents share a row of a batch.
            pack_length: Most tokens of such a row; the largest max_length of the stores by default.
            eval_fraction: Share of the documents, by digest, that is held out.
            shuffle_window: Shards among which documents are shuffled.
            seed: Of the order, and of the column random.

        Raises:
            ValueError: A value is out of its range, or the stores do not go together.
            LayerNotFoundError: A store lacks the target or losses, or some shards of them.
            IdentityError: Some shards of them were computed from other values than the store holds now.
            DamagedShardError: The lengths of some documents are not what was committed.
        """
        self.stores = tuple(stores)
        self.columns = tuple(columns)
        self._losses = {name: check_losses_given(name, losses or {}) for name in LOSSES if name in self.columns}
        self._layers = tuple(
            dict.fromkeys(
                ["tokens"]
                + ["target"] * (reads_target or "target_entropy" in self.columns)
                + [losses_layer(name) for name in self._losses.values()]
            )
        )
        for store in self.stores:
            for name in self._losses.values():
                store.loss(name)
            for name in self._layers:
                check_complete(store, name)
        check_alike(self.stores, reads_target="target" in self._layers, losses=self._losses.values())
        if packing and pack_length is None:
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
        self._capacity = 2 * shuffle_window
        self._reader: ShardPrefetcher | None = None

    def __len__(self) -> int:
        """Packs of an epoch."""
        return self.order.packs_per_epoch

    def __getitem__(self, pack: Pack) -> list[Sample]:
        if self._reader is None or self._reader.pid != os.getpid():
            self._reader = ShardPrefetcher(self.stores, self._layers, self._capacity)
        shard = self._reader.get(pack.store, pack.shard, pack.soon)
        return [self._sample(shard, pack, document) for document in pack.documents]

    # A worker has a reader of its own: threads, and much else of one, do not live on in another process.

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_reader": None}

    def document(self, store: int, document: int) -> Sample:
        """Reads one document by its number, held out or not."""
        shard, _ = self.stores[store].locate(document)
        (sample,) = self[Pack(store=store, shard=shard, documents=(document,))]
        return sample

    def collator(self) -> Collator:
        """Returns what makes a batch of packs."""
        target = self.stores[0].spec.target
        return Collator(
            packing=self.order.packing,
            reads_target=self._reads_target,
            is_drawn=target is not None and target.scheme.draws,
            columns=self.columns,
        )

    def close(self) -> None:
        """Gives up what is being read ahead in this process, and what is kept in memory."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _sample(self, shard: Shard, pack: Pack, document: int) -> Sample:
        _, place = self.stores[pack.store].locate(document)
        some = slice(int(shard.starts[place]), int(shard.starts[place + 1]))
        found = shard.document(place)
        columns = {column: shard.losses[name][some] for column, name in self._losses.items()}
        if "target_entropy" in self.columns and found.rows is not None:
            columns["target_entropy"] = found.rows.entropy
        if "random" in self.columns:
            rng = np.random.default_rng([pack.seed, ROWS, pack.epoch, pack.store, document])
            columns["random"] = rng.random(len(found.ids), dtype=np.float32)
        return Sample(
            ids=found.ids,
            loss_mask=found.loss_mask,
            rows=found.rows if self._reads_target else None,
            columns=columns,
        )
