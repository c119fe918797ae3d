"""Division of packs into steps and micro-batches and among ranks, and position of a run in the order of packs.

Depends on the standard library only.

An optimizer step takes the next packs of the order. The position of a run therefore consists of the epoch and the
number of this epoch's packs that are done. When a run continues from a position, the number of ranks and the number of
packs per step may differ from those before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import TrainingArguments

    from trainer.data.order import PackOrder


@dataclass(frozen=True, slots=True, kw_only=True)
class Deal:
    """Division of the packs of an order into optimizer steps and micro-batches, and among ranks.

    A step takes the next `packs_per_step` packs of the order. A micro-batch takes the next `per_device_batch * ranks`
    packs of its step, and the ranks take these packs in turn. The packs that are left at the end of an epoch make a
    short step, in which some ranks get fewer packs or none.
    """

    per_device_batch: int
    """Number of packs that one rank gets in a micro-batch."""
    ranks: int = 1
    """Number of ranks."""
    accumulation: int = 1
    """Number of micro-batches in a step."""
    drop_last: bool = False
    """Whether the short step at the end of an epoch is left out."""

    @property
    def packs_per_step(self) -> int:
        """Number of packs in a full optimizer step, on all ranks together."""
        return self.per_device_batch * self.ranks * self.accumulation

    def num_steps(self, packs: int) -> int:
        """Returns the number of steps that train on the last `packs` packs of an epoch."""
        return packs // self.packs_per_step if self.drop_last else -(-packs // self.packs_per_step)

    def num_batches(self, packs: int) -> int:
        """Returns the number of micro-batches in the last `packs` packs of an epoch; it is the same on every rank."""
        return -(-self._used(packs) // (self.per_device_batch * self.ranks))

    def batches(self, packs: int, rank: int) -> Iterator[range]:
        """Yields the micro-batches of a rank. Each is a range of indices into the last `packs` packs of an epoch.

        All ranks get the same number of micro-batches, because they run every step together. Therefore the last
        micro-batch may be empty on some ranks.
        """
        size, used = self.per_device_batch * self.ranks, self._used(packs)
        for start in range(0, used, size):
            yield range(start + rank, min(start + size, used), self.ranks)

    def _used(self, packs: int) -> int:
        """Returns how many of `packs` packs are trained on: all, or only those in full steps if `drop_last` is set."""
        return self.num_steps(packs) * self.packs_per_step if self.drop_last else packs


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """Position of a run in the order of its packs."""

    epoch: int = 0
    """Number of the epoch, from 0."""
    packs: int = 0
    """Number of the epoch's packs that are done."""
    is_open: bool = False
    """True if the callback `on_epoch_end` has not been called since the last step. Trainer calls this callback when an
    epoch ends, and when the run ends."""
    steps: int = 0
    """Number of optimizer steps since the run began."""

    def num_epochs(self, packs_per_epoch: int, deal: Deal, *, max_steps: int) -> int:
        """Returns the number of epochs in which a run reaches `max_steps` steps.

        Args:
            packs_per_epoch: Number of packs in an epoch.
            deal: Division of the packs after the current position.
            max_steps: Number of optimizer steps in the whole run, including those before the current position.

        Returns:
            Number of epochs since the run began. If the run ends within an epoch, that epoch is counted.
        """
        left = max_steps - self.steps
        here = deal.num_steps(packs_per_epoch - self.packs)
        # An open epoch is counted even if no steps are left, because its callbacks are still due.
        if left <= 0:
            return self.epoch + self.is_open
        if left <= here:
            return self.epoch + 1
        return self.epoch + 1 + -(-(left - here) // deal.num_steps(packs_per_epoch))

    def num_steps(self, packs_per_epoch: int, deal: Deal, *, epochs: float) -> int:
        """Returns the number of steps that a run has made when it has finished `epochs` epochs.

        The result includes the steps before this position. The number of packs per step may have been different in
        those steps.

        Args:
            packs_per_epoch: Number of packs in an epoch.
            deal: Division of the packs after the current position.
            epochs: Number of epochs since the run began; not necessarily an integer. With 2.5, for example, the run
                ends after half of the packs of the third epoch.
        """
        steps, packs = self.steps, self.packs
        for epoch in range(self.epoch, math.ceil(epochs)):
            share = min(1.0, epochs - epoch) * packs_per_epoch
            # The margin absorbs rounding errors of `epochs`, which could otherwise add a step.
            needed = math.ceil((share - packs) / deal.packs_per_step - 1e-9)
            steps += max(0, min(needed, deal.num_steps(packs_per_epoch - packs)))
            packs = 0
        return steps


def make_deal(args: TrainingArguments, order: PackOrder, batch_size: int | None = None) -> Deal:
    """Makes the division of packs from the arguments of a run.

    Args:
        args: Arguments of the run.
        order: Order of the packs.
        batch_size: Number of packs that one rank gets in a micro-batch; None stands for the batch size in `args`.

    Raises:
        ValueError: Short steps are left out (`dataloader_drop_last`), and an epoch has fewer packs than one step.
    """
    deal = Deal(
        per_device_batch=args.train_batch_size if batch_size is None else batch_size,
        ranks=args.world_size,
        accumulation=args.gradient_accumulation_steps,
        drop_last=args.dataloader_drop_last,
    )
    if not deal.num_steps(order.packs_per_epoch):
        raise ValueError(
            f"dataloader_drop_last must be False if an epoch has fewer packs than a step, got True with "
            f"{order.packs_per_epoch} packs and steps of {deal.packs_per_step}; omit it, or give a smaller "
            "--per_device_train_batch_size"
        )
    return deal
