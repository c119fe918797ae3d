"""The LM head and the objective in chunks of rows: no [rows, vocabulary] tensor exists, forward or backward.

N rows, M of them selected, K entries per row at most, V vocabulary, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.utils.checkpoint import checkpoint

from logitstore.support import Support, on_support, soft_cross_entropy
from trainer.selection import Candidates, Selected, Selection

if TYPE_CHECKING:
    from torch import Tensor

    from logitstore.causal_lm import SplitLM
    from trainer.objectives import Objective


@dataclass(frozen=True, slots=True, kw_only=True)
class RowLosses:
    """What the draft loses on N rows, nats."""

    objective: Tensor
    """Float32 [N], with gradient."""
    ce: Tensor
    """Float32 [N]: CE(p, draft), without gradient."""
    label_nll: Tensor
    """Float32 [N]: minus the draft's logprob of the token that follows, without gradient."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectedLosses:
    """The outcome of a micro-batch."""

    selected: Selected
    """Which of the N rows count."""
    objective: Tensor
    """Float32 [M], with gradient: the losses of the rows that count."""
    known: RowLosses
    """Losses as far as they were computed, for the log: of all N rows, or of the M alone if nothing scored the rest."""
    known_support: Support
    """The rows of `known`."""


def row_losses(split: SplitLM, hidden: Tensor, support: Support, labels: Tensor, objective: Objective) -> RowLosses:
    """Computes the losses of rows, `split.rows_per_chunk` at a time.

    Under gradient the logits of a chunk are computed again in the backward pass instead of being kept.

    Args:
        split: The draft.
        hidden: [N, H], what its backbone says.
        support: N rows of the target.
        labels: Int64 [N].
        objective: What to minimise.
    """

    def losses(hidden: Tensor, part: Support, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logprobs = split.logits(hidden).log_softmax(-1)
        kept, tail = on_support(logprobs, part)
        ce = soft_cross_entropy(part, kept.detach(), tail.detach())
        return objective(part, kept, tail), ce, -logprobs.detach().gather(1, labels[:, None])[:, 0]

    chunks = []
    size = split.rows_per_chunk
    for start in range(0, max(1, len(hidden)), size):  # once even without rows: the loss must hang on every parameter
        some = slice(start, start + size)
        # the last chunk is the first that backward comes to: computing it again would save nothing
        if torch.is_grad_enabled() and start + size < len(hidden):
            chunk = checkpoint(
                losses, hidden[some], support[some], labels[some], use_reentrant=False, preserve_rng_state=False
            )
        else:
            chunk = losses(hidden[some], support[some], labels[some])
        chunks.append(chunk)
    joined = [torch.cat(values) for values in zip(*chunks, strict=True)]
    return RowLosses(objective=joined[0], ce=joined[1], label_nll=joined[2])


def selected_losses(
    split: SplitLM,
    hidden: Tensor,
    support: Support,
    labels: Tensor,
    reference_ce: Tensor | None,
    *,
    objective: Objective,
    selection: Selection,
    keep: float,
    generator: torch.Generator,
) -> SelectedLosses:
    """Selects rows of a micro-batch and computes their losses.

    Args:
        split: The draft.
        hidden: [N, H], what its backbone says at the rows whose loss mask is 1.
        support: N rows of the target.
        labels: Int64 [N], the tokens that follow.
        reference_ce: Float32 [N], CE(p, reference), or None.
        objective: What to minimise on the selected rows.
        selection: Which rows count.
        keep: The fraction to keep, in (0, 1].
        generator: For a random selection.
    """
    scored = None
    if selection.needs_losses:
        with torch.no_grad():
            scored = row_losses(split, hidden, support, labels, soft_cross_entropy)
    candidates = Candidates(
        num_rows=len(support),
        device=hidden.device,
        draft_ce=None if scored is None else scored.ce,
        reference_ce=reference_ce,
        generator=generator,
    )
    selected = selection.select(candidates, keep)
    (rows,) = selected.kept.nonzero(as_tuple=True)
    kept = row_losses(split, hidden.index_select(0, rows), support[rows], labels[rows], objective)
    return SelectedLosses(
        selected=selected,
        objective=kept.objective,
        known=kept if scored is None else scored,
        known_support=support[rows] if scored is None else support,
    )
