"""What a model says on the stored support of rows: the kept entries, and the tail as one more bucket. torch only.

The dump's losses and the trainer's objectives both come from here, so that a loss gap compares like with like.
N rows, K entries per row at most, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TAIL_FLOOR = 1e-6
"""The model's tail probability never counts as less: a float32 sum of kept probabilities is no truer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Support:
    """N rows of the target on a device, as a rectangle."""

    token_ids: Tensor
    """Int64 [N, K]; 0 beyond a row's entries."""
    probs: Tensor
    """Float32 [N, K]; 0 beyond a row's entries. With the tail they sum to 1."""
    tail: Tensor
    """Float32 [N]: tail mass."""

    def __len__(self) -> int:
        return len(self.tail)

    def __getitem__(self, rows: slice | Tensor) -> Support:
        return Support(token_ids=self.token_ids[rows], probs=self.probs[rows], tail=self.tail[rows])

    @property
    def used(self) -> Tensor:
        """Bool [N, K]: which places hold an entry."""
        return self.probs > 0

    def entropy(self) -> Tensor:
        """Float32 [N]: entropy of the kept entries and the tail bucket, nats."""
        return -(torch.xlogy(self.probs, self.probs).sum(-1) + torch.xlogy(self.tail, self.tail))


def on_support(logprobs: Tensor, support: Support) -> tuple[Tensor, Tensor]:
    """Reduces a model's distribution to the support.

    Args:
        logprobs: Float32 [N, V], normalised.
        support: N rows.

    Returns:
        Logprobs of the kept entries [N, K] (0 beyond a row's entries), and log of the mass left for the tail [N].
    """
    kept = logprobs.gather(1, support.token_ids).where(support.used, 0.0)
    mass = kept.exp().where(support.used, 0.0).sum(-1)
    return kept, (1.0 - mass).clamp_min(TAIL_FLOOR).log()


def soft_cross_entropy(support: Support, kept: Tensor, tail: Tensor) -> Tensor:
    """Computes CE(p, q) = -sum_S p log q - p_t log q_t of each row.

    Args:
        support: N rows of the target p.
        kept: Logprobs of q at the entries [N, K], as from `on_support`.
        tail: Log of q's tail mass [N].

    Returns:
        Float32 [N], nats. CE(p, q) - CE(p, r) is the loss gap: the target's entropy cancels.
    """
    return -((support.probs * kept).sum(-1) + support.tail * tail)
