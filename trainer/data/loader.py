"""Sampler and DataLoader of one rank."""

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
    """Micro-batches of one rank, from a position in an epoch to the end of that epoch."""

    def __init__(self, order: PackOrder, deal: Deal, rank: int = 0) -> None:
        """Sets the position to the beginning of epoch 0.

        Args:
            order: Order of the packs.
            deal: Division of the packs into steps, micro-batches and ranks.
            rank: Number of this rank, from 0.
        """
        self._order = order
        self._deal = deal
        self._rank = rank
        self._epoch = self._packs = 0

    def begin(self, epoch: int, packs: int = 0) -> None:
        """Sets the position that the next iteration starts from.

        Args:
            epoch: Number of the epoch, from 0.
            packs: Number of the epoch's packs that are done, on all ranks together.
        """
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
    """Makes the DataLoader of one rank.

    Args:
        dataset: Dataset that reads the packs.
        batches: The rank's micro-batches.
        num_workers: Number of worker processes; 0 reads in this process. This argument and those below are passed to
            torch.utils.data.DataLoader.
        pin_memory: Whether batches are copied to pinned memory.
        prefetch_factor: Number of batches that each worker prepares ahead; None for the default of DataLoader.
        persistent_workers: Whether the worker processes are kept for the next epoch.
        multiprocessing_context: Start method of the workers, such as "spawn"; None for the default of DataLoader.
    """
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=dataset.collator(),
        # By default, a loader draws from torch's global generator, which would change the dropout masks of training.
        generator=torch.Generator(),
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=prefetch_factor,
        persistent_workers=persistent_workers,
        multiprocessing_context=multiprocessing_context,
    )
