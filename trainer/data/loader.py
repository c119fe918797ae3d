"""The batches of one rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.utils.data import DataLoader, Sampler

from trainer.data.order import Pack, PackOrder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trainer.data.collate import Sample
    from trainer.data.dataset import DocumentDataset
    from trainer.data.sharding import Deal


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
