"""Which rows of a micro-batch count: functions of N candidate rows and the fraction to keep. torch only.

The scope is the masked rows of one micro-batch on one rank, as in AdaSPEC's published runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """What a selection may look at."""

    num_rows: int
    """N"""
    device: torch.device
    """Where the mask is wanted."""
    draft_ce: Tensor | None
    """Float32 [N]: CE(p, draft) now, without gradient; None unless the selection asks for it."""
    reference_ce: Tensor | None
    """Float32 [N]: CE(p, reference) from the store; None where none was given."""
    generator: torch.Generator
    """Of random numbers, on the CPU."""

    def gap(self) -> Tensor:
        """Returns the loss gap CE(p, draft) - CE(p, reference), float32 [N].

        Raises:
            ValueError: There is no reference.
        """
        if self.draft_ce is None or self.reference_ce is None:
            raise ValueError("reference must be given for a selection by loss gap, got reference=None; add --reference")
        return self.draft_ce - self.reference_ce


@dataclass(frozen=True, slots=True, kw_only=True)
class Selected:
    """Which rows count, and what is logged of it."""

    kept: Tensor
    """Bool [N]"""
    threshold: Tensor
    """Float32 scalar: the least score of a kept row; NaN where there are no rows or nothing was scored."""


def _top(scores: Tensor, keep: float) -> Selected:
    """Keeps the rows that reach the (1 - keep) quantile of the scores, linearly interpolated; ties are all kept."""
    if not len(scores):  # a micro-batch may hold no row whose loss mask is 1
        return Selected(kept=scores > 0, threshold=scores.new_tensor(torch.nan))
    threshold = torch.quantile(scores, 1.0 - keep)
    return Selected(kept=scores >= threshold, threshold=threshold)


def select_all(candidates: Candidates, keep: float) -> Selected:
    """Keeps every row, whatever `keep` is: ordinary distillation."""
    return Selected(
        kept=torch.ones(candidates.num_rows, dtype=torch.bool, device=candidates.device),
        threshold=torch.full((), torch.nan, device=candidates.device),
    )


def select_random(candidates: Candidates, keep: float) -> Selected:
    """Keeps a fraction of the rows by random scores, by the rule of `select_adaspec`: its control."""
    # drawn on the CPU, so that every device keeps the same rows
    scores = torch.rand(candidates.num_rows, generator=candidates.generator)
    return _top(scores.to(candidates.device), keep)


def select_adaspec(candidates: Candidates, keep: float) -> Selected:
    """Keeps the rows with the largest loss gap: those that the reference shows the draft can still learn.

    AdaSPEC, arXiv 2510.19779, eqs. 7-9; the threshold is the (1 - keep) quantile of the micro-batch, as released.
    """
    return _top(candidates.gap(), keep)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """A selection and what it needs."""

    select: Callable[[Candidates, float], Selected]
    needs_losses: bool = False
    """Whether it looks at the draft's and the reference's losses: costs one more pass of the head without gradient."""


SELECTIONS = {
    "all": Selection(select=select_all),
    "random": Selection(select=select_random),
    "adaspec": Selection(select=select_adaspec, needs_losses=True),
}
"""By the name that --selection takes."""
