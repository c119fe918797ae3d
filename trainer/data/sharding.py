"""What a rank gets of the order: optimizer steps, micro-batches, and how far a run is. Standard library only.

An optimizer step takes the next few packs of the order, so that a position in training is an epoch and how many of its
packs are done, whatever the number of ranks and the size of a step are from there on.
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
    """How the packs of an order are dealt to optimizer steps, their micro-batches, and ranks.

    A step takes the next `packs_per_step`, a micro-batch of it the next `per_device_batch * ranks` of these, which are
    dealt in turn. What is left at the end of an epoch makes a short step, in which some ranks get fewer packs or none.
    """

    per_device_batch: int
    """Packs of a micro-batch of one rank."""
    ranks: int = 1
    accumulation: int = 1
    """Micro-batches of a step."""
    drop_last: bool = False
    """Whether short steps are left out."""

    @property
    def packs_per_step(self) -> int:
        """Packs of a whole optimizer step."""
        return self.per_device_batch * self.ranks * self.accumulation

    def num_steps(self, packs: int) -> int:
        """Returns how many steps `packs` packs make."""
        return packs // self.packs_per_step if self.drop_last else -(-packs // self.packs_per_step)

    def num_batches(self, packs: int) -> int:
        """Returns how many micro-batches each rank gets of `packs` packs."""
        return -(-self._used(packs) // (self.per_device_batch * self.ranks))

    def batches(self, packs: int, rank: int) -> Iterator[range]:
        """Yields the micro-batches of a rank, as places among `packs` packs; some may be empty at the end."""
        size, used = self.per_device_batch * self.ranks, self._used(packs)
        for start in range(0, used, size):
            yield range(start + rank, min(start + size, used), self.ranks)

    def _used(self, packs: int) -> int:
        return self.num_steps(packs) * self.packs_per_step if self.drop_last else packs


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """How far a run is."""

    epoch: int = 0
    packs: int = 0
    """Packs of the epoch that are done."""
    is_open: bool = False
    """Whether callbacks have not heard of the end of this epoch, or of the run in it, since the last step."""
    steps: int = 0
    """Optimizer steps made."""

    def num_epochs(self, packs_per_epoch: int, deal: Deal, *, max_steps: int) -> int:
        """Returns by how many epochs, the done ones counted, `max_steps` steps in all are made."""
        left = max_steps - self.steps
        here = deal.num_steps(packs_per_epoch - self.packs)
        if left <= 0:
            return self.epoch + self.is_open
        if left <= here:
            return self.epoch + 1
        return self.epoch + 1 + -(-(left - here) // deal.num_steps(packs_per_epoch))

    def num_steps(self, packs_per_epoch: int, deal: Deal, *, epochs: float) -> int:
        """Returns how many steps, the made ones counted, `epochs` epochs take; a broken one ends at its share of packs.

        A run that went on with another number of packs in a step has made more or fewer until here.
        """
        steps, packs = self.steps, self.packs
        for epoch in range(self.epoch, math.ceil(epochs)):
            share = min(1.0, epochs - epoch) * packs_per_epoch
            wanted = math.ceil((share - packs) / deal.packs_per_step - 1e-9)
            steps += max(0, min(wanted, deal.num_steps(packs_per_epoch - packs)))
            packs = 0
        return steps


def make_deal(args: TrainingArguments, order: PackOrder, batch_size: int | None = None) -> Deal:
    """Returns how packs are dealt to the ranks of this run.

    Args:
        args: Of the run.
        order: What is read.
        batch_size: Packs of a micro-batch on a rank; that of the arguments by default.

    Raises:
        ValueError: An epoch does not have as many packs as one step.
    """
    deal = Deal(
        per_device_batch=args.train_batch_size if batch_size is None else batch_size,
        ranks=args.world_size,
        accumulation=args.gradient_accumulation_steps,
        drop_last=args.dataloader_drop_last,
    )
    if not deal.num_steps(order.packs_per_epoch):
        raise ValueError(
            f"dataloader_drop_last must be False where an epoch has fewer packs than a step, got True with "
            f"{order.packs_per_epoch} packs and steps of {deal.packs_per_step}; leave it out, or give a smaller "
            "--per_device_train_batch_size"
        )
    return deal
