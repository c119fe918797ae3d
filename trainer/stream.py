"""Stores -> batches: reads packs of documents in the order of an epoch, and shards ahead of it.

Which packs come when is `trainer.order`'s, what a batch looks like `trainer.collate`'s; here is the process that reads.
NumPy and torch only; nothing here knows a model.

Shards are read whole and stay decoded: those of two windows of the order at most, in each process that reads, some
60 MB each at 2**18 rows of 20 entries. A thread reads and decodes what comes next, so that neither a bucket's latency
nor decoding is waited for.

Workers (`--dataloader_num_workers`) do not help: each decodes every shard for itself, since a batch may need any of a
window, and handing over a batch costs more than laying it out. On two cores one process alone reads 700,000 rows/s from
a folder and 250,000 from a bucket, with a worker 130,000 and 90,000, where the demo's drafts train on 8,000 and 20,000
(benchmarks/bench_loader.py), which they slow down by 5 to 45 %.
"""

from __future__ import annotations

import copy
import os
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from logitstore.errors import IdentityError, LayerNotFoundError
from logitstore.format.layout import losses_layer
from logitstore.storage.options import without_credentials
from logitstore.store.commits.set_aside import explain_missing
from trainer.collate import Collator, Sample
from trainer.order import MAX_WINDOW, ROWS, Pack, PackOrder

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from concurrent.futures import Future

    from logitstore import Store
    from logitstore.format.spec import ModelSpec
    from logitstore.rows.shard import Shard
    from trainer.deal import Deal

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
        self._reader: ShardReader | None = None

    def __len__(self) -> int:
        """Packs of an epoch."""
        return self.order.packs_per_epoch

    def __getitem__(self, pack: Pack) -> list[Sample]:
        if self._reader is None or self._reader.pid != os.getpid():
            self._reader = ShardReader(self.stores, self._layers, self._capacity)
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


class ShardReader:
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


def check_losses_given(column: str, losses: Mapping[str, str]) -> str:
    """Returns the name of the losses that a column is.

    Raises:
        ValueError: None is given.
    """
    if column not in losses:
        raise ValueError(
            f"losses must name the stores' losses that {column} is, got losses={dict(losses)}; add it, such as "
            f"{{{column!r}: 'reference'}}"
        )
    return losses[column]


def check_complete(store: Store, layer: str) -> None:
    """Checks that a layer is there with every shard: training on part of a store would go unnoticed.

    Raises:
        LayerNotFoundError: It is not.
        IdentityError: Some shards were computed from other tokens or target rows than the store holds now: reading
            them would fail, hours later perhaps.
    """
    if layer not in store.layers:
        raise LayerNotFoundError(
            f"store must have a layer {layer!r}, got layers={list(store.layers)} in {store.url}; "
            "dump it first with jobs/dump_logits.py"
        )
    if missing := store.layers[layer].gaps:
        total = store.spec.num_shards
        there = total - store.layers[layer].num_missing
        raise LayerNotFoundError(
            f"layer {layer!r} must have all of its {total} shards, got {there} in {store.url} (shard "
            f"{missing[0].start} is the first missing); run the dump again to finish it"
            f"{explain_missing(store.storage, layer)}"
        )
    if stale := store.layers[layer].stale:
        raise IdentityError(
            f"layer {layer!r} must be computed from what the store holds now, got {len(stale)} stale shards in "
            f"{store.url} (shard {min(stale)} is the first); run the dump again, which replaces them"
        )


def check_alike(stores: Sequence[Store], *, reads_target: bool, losses: Iterable[str] = ()) -> None:
    """Checks that documents of all stores can be rows of one batch.

    Raises:
        ValueError: There is no store; or they differ in their tokenizer, in the model of losses that are read, or, if
            the target is read, in it or in whether entries were drawn. Names both stores.
    """
    if not stores:
        raise ValueError("stores must be at least one, got none; add --store")
    first = stores[0]
    losses = tuple(losses)
    for store in stores[1:]:
        ours, theirs = (_traits(each, reads_target=reads_target, losses=losses) for each in (first, store))
        for (name, one), other in zip(ours.items(), theirs.values(), strict=True):
            if one[0] != other[0]:
                raise ValueError(
                    f"stores must be of one {name} to be trained on together, got {name}={one[1]} in {first.url} and "
                    f"{name}={other[1]} in {store.url}; leave one out"
                )


def _traits(store: Store, *, reads_target: bool, losses: Iterable[str]) -> dict[str, tuple[object, str]]:
    """Returns what stores that go together share, and how to call it."""
    made, target = store.spec.tokenizer, store.spec.target
    traits: dict[str, tuple[object, str]] = {
        "tokenizer": (made.fingerprint, f"{made.name} ({made.fingerprint[:19]})")
    }
    if reads_target and target is not None:
        traits["kind of entries"] = (target.scheme.draws, "drawn" if target.scheme.draws else "truncated")
        traits["target"] = ((target.model.name, target.model.revision), _called(target.model))
    # gaps to different models do not compare
    for name in losses:
        model = store.spec.losses[name].model
        traits[f"model of losses {name}"] = (model.revision, _called(model))
    return traits


def _called(model: ModelSpec) -> str:
    return f"{without_credentials(model.name)} at {model.revision}"


class RankBatches(Sampler[list[Pack]]):
    """The micro-batches of one rank, from a position in an epoch to its end."""

    def __init__(self, order: PackOrder, deal: Deal, rank: int = 0) -> None:
        self._order = order
        self._deal = deal
        self._rank = rank
        self._epoch = self._packs = 0

    def begin(self, epoch: int, packs: int = 0) -> None:
        """Sets the epoch, and how many packs of it are done."""
        self._epoch, self._packs = epoch, packs

    def __len__(self) -> int:
        return self._deal.num_batches(self._order.packs_per_epoch - self._packs)

    def __iter__(self) -> Iterator[list[Pack]]:
        epoch, done = self._order.epoch(self._epoch), self._packs
        for places in self._deal.batches(len(epoch) - done, self._rank):
            yield [epoch[done + place] for place in places]


def make_loader(
    dataset: DocumentDataset,
    batches: RankBatches,
    *,
    num_workers: int = 0,
    pin_memory: bool = False,
    prefetch_factor: int | None = None,
    persistent_workers: bool = False,
    multiprocessing_context: str | None = None,
) -> DataLoader[list[Sample]]:
    """Makes a loader of what one rank reads; the arguments are those of torch.utils.data.DataLoader."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=dataset.collator(),
        # Without one of its own a loader draws from the generator that dropout draws from.
        generator=torch.Generator(),
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=prefetch_factor,
        persistent_workers=persistent_workers,
        multiprocessing_context=multiprocessing_context,
    )
