"""What a model says on the stored support of rows: the kept entries, and the tail as one more bucket. torch only.

The dump's losses and the trainer's objectives both come from here, so that a loss gap compares like with like.
N rows, K entries per row at most, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from logitstore.rows.rows import Padded

TAIL_FLOOR = 1e-6
"""The model's tail probability never counts as less: a float32 sum of kept probabilities is no truer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Support:
    """N rows of the target on a device, as a rectangle: what objectives and losses weigh."""

    token_ids: Tensor
    """Int64 [N, K]; 0 beyond a row's entries."""
    probs: Tensor
    """Float32 [N, K]: p of the entries, 0 beyond a row's. With the tail they sum to 1."""
    tail: Tensor
    """Float32 [N]: tail mass."""
    weights: Tensor | None = None
    """Float32 [N, K]: what entries stand for where they were drawn: with 0 for all others an unbiased estimate of p.
    None where rows are truncated: entries stand for themselves, and the tail for the rest."""
    drawn_entropy: Tensor | None = None
    """Float32 [N]: entropy of p where entries were drawn; None where it follows from `probs` and `tail`."""

    def __len__(self) -> int:
        return len(self.tail)

    def __getitem__(self, rows: slice | Tensor) -> Support:
        return Support(
            token_ids=self.token_ids[rows],
            probs=self.probs[rows],
            tail=self.tail[rows],
            weights=None if self.weights is None else self.weights[rows],
            drawn_entropy=None if self.drawn_entropy is None else self.drawn_entropy[rows],
        )

    @staticmethod
    def of(rows: Padded, device: torch.device) -> Support:
        """Brings rows to a device."""
        return Support(
            token_ids=torch.from_numpy(rows.token_ids).to(device),
            probs=torch.from_numpy(rows.probs).to(device),
            tail=torch.from_numpy(rows.tail).to(device),
            weights=None if rows.weights is None else torch.from_numpy(rows.weights).to(device),
            drawn_entropy=None if rows.entropy is None else torch.from_numpy(rows.entropy).to(device),
        )

    @property
    def used(self) -> Tensor:
        """Bool [N, K]: which places hold an entry."""
        return self.probs > 0

    def entropy(self) -> Tensor:
        """Float32 [N], nats: of the kept entries and the tail bucket, or of p where entries were drawn."""
        if self.drawn_entropy is not None:
            return self.drawn_entropy
        return -(torch.xlogy(self.probs, self.probs).sum(-1) + torch.xlogy(self.tail, self.tail))


def normalised(logits: Tensor) -> Tensor:
    """Returns logprobs whose probabilities sum to 1 within 1e-6; without a gradient.

    Of 262,144 tokens a CPU's float32 log_softmax alone is off by up to 1e-3, all tokens of a row by the same.

    Args:
        logits: Float32 [N, V].
    """
    logprobs = logits.log_softmax(-1)
    return logprobs.sub_(logprobs.exp().sum(-1, keepdim=True).log())


def on_support(logprobs: Tensor, support: Support) -> tuple[Tensor, Tensor]:
    """Reduces a model's distribution to the support.

    Args:
        logprobs: Float32 [N, V], normalised.
        support: N rows.

    Returns:
        Logprobs of the kept entries [N, K] (0 beyond a row's entries), and log of the mass left for the tail [N].
    """
    kept = logprobs.gather(1, support.token_ids).where(support.used, 0.0)
    return kept, log_tail(kept, support)


def log_tail(kept: Tensor, support: Support) -> Tensor:
    """Returns the log of the mass that a model leaves for the tail [N], from its logprobs of the entries [N, K]."""
    left = 1.0 - kept.exp().where(support.used, 0.0).sum(-1)
    # below the floor too the gradient must say that there is too little, or the tail is never learnt
    return (left + (left.clamp_min(TAIL_FLOOR) - left).detach()).log()


def acceptance_estimate(support: Support, kept: Tensor, tail: Tensor) -> Tensor:
    """Estimates alpha = sum_v min(p_v, q_v) of each row from what is stored of p.

    Args:
        support: N rows of the target p.
        kept: Logprobs of q at the entries [N, K], as from `on_support`.
        tail: Log of q's tail mass [N].

    Returns:
        [N]. Where rows are truncated sum_S min(p, q) + min(p_t, q_t), where entries were drawn sum_S w min(1, q / p).
    """
    q = kept.exp().where(support.used, 0.0)
    if support.weights is None:
        return (torch.minimum(support.probs, q).sum(-1) + torch.minimum(support.tail, tail.exp())).clamp(0.0, 1.0)
    return (support.weights * (q / support.probs.where(support.used, 1.0)).clamp_max(1.0)).sum(-1)


def soft_cross_entropy(support: Support, kept: Tensor, tail: Tensor) -> Tensor:
    """Computes CE(p, q) = -sum_S p log q - p_t log q_t of each row: the entries that are stored, and the rest as one.

    Of drawn entries too: their probabilities are known. CE(p, q) - CE(p, r) is the loss gap, in which the target's
    entropy cancels; the estimate by weights has no bias, but noise that hides the gap of two models that are alike.

    Args:
        support: N rows of the target p.
        kept: Logprobs of q at the entries [N, K], as from `on_support`.
        tail: Log of q's tail mass [N].

    Returns:
        Float32 [N], nats; at most CE(p, q) over the whole vocabulary.
    """
    return -((support.probs * kept).sum(-1) + support.tail * tail)


def estimated_cross_entropy(support: Support, kept: Tensor, tail: Tensor) -> Tensor:
    """Computes what drafts learn from: -sum_S w log q where entries were drawn, else as `soft_cross_entropy`.

    An unbiased estimate of CE over the whole vocabulary, as is its gradient (arXiv 2503.16870).

    Args and returns: As `soft_cross_entropy`.
    """
    if support.weights is not None:
        return -(support.weights * kept).sum(-1)
    return soft_cross_entropy(support, kept, tail)
