"""Computes a model's probabilities and losses on the support of stored rows.

The support of a row is its kept entries, and the tail as one more bucket. The dump's losses and the trainer's
objectives both use these functions, so that a loss gap compares values that were computed in the same way. Uses only
torch.

p: the target's distribution; q: the model's distribution. S: the kept entries of a row. p_t, q_t: tail mass of p and of
q. N: rows, K: largest number of entries in a row, V: vocabulary size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from logitstore.rows.rows import Padded

TAIL_FLOOR = 1e-6
"""Lowest tail mass of a model; smaller values are raised to it. The tail mass is 1 minus a float32 sum of kept
probabilities, and that sum is no more accurate than 1e-6."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Support:
    """N rows of the target on a device, padded to the same number of entries: the input of losses and objectives."""

    token_ids: Tensor
    """Int64 [N, K]: ids of the entries; 0 beyond a row's entries."""
    probs: Tensor
    """Float32 [N, K]: probabilities p of the entries; 0 beyond a row's entries. The `probs` and the `tail` of
    a row sum to 1."""
    tail: Tensor
    """Float32 [N]: tail mass of p, in [0, 1]."""
    weights: Tensor | None = None
    """Float32 [N, K]: weights of the entries, for the schemes that draw entries (sample, hybrid). The weights, together
    with 0 for all other ids, are an unbiased estimate of p. None for truncated rows (topk, nucleus)."""
    drawn_entropy: Tensor | None = None
    """Float32 [N], nats: entropy of p over the whole vocabulary, for the schemes that draw entries. None for truncated
    rows: their entropy is computed from `probs` and `tail`."""

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
        """Copies padded rows to a device."""
        return Support(
            token_ids=torch.from_numpy(rows.token_ids).to(device),
            probs=torch.from_numpy(rows.probs).to(device),
            tail=torch.from_numpy(rows.tail).to(device),
            weights=None if rows.weights is None else torch.from_numpy(rows.weights).to(device),
            drawn_entropy=None if rows.entropy is None else torch.from_numpy(rows.entropy).to(device),
        )

    @property
    def used(self) -> Tensor:
        """Bool [N, K]: True for entries, False for padding."""
        return self.probs > 0

    def entropy(self) -> Tensor:
        """Returns the entropy of each row.

        Returns:
            Float32 [N], nats. For truncated rows, the entropy of the kept entries and the tail bucket. For the schemes
            that draw entries, the entropy of p over the whole vocabulary.
        """
        if self.drawn_entropy is not None:
            return self.drawn_entropy
        # xlogy(0, 0) is 0, so that padding and an empty tail add nothing.
        return -(torch.xlogy(self.probs, self.probs).sum(-1) + torch.xlogy(self.tail, self.tail))


def normalised(logits: Tensor) -> Tensor:
    """Computes logprobs whose probabilities sum to 1 within 1e-6. Not differentiable.

    With 262,144 tokens, float32 log_softmax on a CPU has an error of up to 1e-3, which is the same for all tokens of a
    row. This function subtracts that error.

    Args:
        logits: Float32 [N, V].

    Returns:
        Float32 [N, V], nats.
    """
    logprobs = logits.log_softmax(-1)
    return logprobs.sub_(logprobs.exp().sum(-1, keepdim=True).log())


def on_support(logprobs: Tensor, support: Support) -> tuple[Tensor, Tensor]:
    """Reduces a model's distribution over the vocabulary to the support: the kept entries and the tail.

    Args:
        logprobs: Float32 [N, V]: the model's logprobs, normalised.
        support: N rows of the target.

    Returns:
        The model's logprobs of the kept entries [N, K] (0 beyond a row's entries), and the log of the model's tail
        mass [N].
    """
    kept = logprobs.gather(1, support.token_ids).where(support.used, 0.0)
    return kept, log_tail(kept, support)


def log_tail(kept: Tensor, support: Support) -> Tensor:
    """Computes the log of a model's tail mass.

    Args:
        kept: Float32 [N, K]: the model's logprobs of the kept entries.
        support: N rows of the target.

    Returns:
        Float32 [N], at least log(TAIL_FLOOR).
    """
    left = 1.0 - kept.exp().where(support.used, 0.0).sum(-1)
    # With a plain clamp, the gradient would be 0 below the floor, and a draft without tail mass would never learn the
    # tail. The value is therefore clamped, but the gradient is that of the value before the clamp.
    return (left + (left.clamp_min(TAIL_FLOOR) - left).detach()).log()


def acceptance_estimate(support: Support, kept: Tensor, tail: Tensor) -> Tensor:
    """Estimates the acceptance rate of each row under sampling, alpha = sum_v min(p_v, q_v), from the stored entries.

    Args:
        support: N rows of the target p, with weights w if entries were drawn.
        kept: Logprobs of q at the entries [N, K], as returned by `on_support`.
        tail: Log of q's tail mass [N].

    Returns:
        Float32 [N]. For truncated rows, an upper bound of alpha: sum_S min(p, q) + min(p_t, q_t), which is in [0, 1].
        For drawn entries, an unbiased estimate of alpha: sum_S w min(1, q / p), which can be above 1.
    """
    q = kept.exp().where(support.used, 0.0)
    if support.weights is None:
        return (torch.minimum(support.probs, q).sum(-1) + torch.minimum(support.tail, tail.exp())).clamp(0.0, 1.0)
    # Padding has probability 0. Dividing by 1 there avoids NaN.
    return (support.weights * (q / support.probs.where(support.used, 1.0)).clamp_max(1.0)).sum(-1)


def soft_cross_entropy(support: Support, kept: Tensor, tail: Tensor) -> Tensor:
    """Computes the soft cross entropy CE(p, q) = -sum_S p log q - p_t log q_t of each row.

    The tail counts as a single outcome. Drawn entries are treated like the entries of truncated rows, because the
    probabilities p of drawn entries are stored too. An estimate with the weights of the draws would be unbiased, but
    its noise would hide the loss gap of two similar models. The loss gap is CE(p, q) - CE(p, r), where r is the
    distribution of a reference model. The entropy of p cancels in this difference.

    Args:
        support: N rows of the target p.
        kept: Logprobs of q at the entries [N, K], as returned by `on_support`.
        tail: Log of q's tail mass [N].

    Returns:
        Float32 [N], nats; at most CE(p, q) over the whole vocabulary.
    """
    return -((support.probs * kept).sum(-1) + support.tail * tail)


def estimated_cross_entropy(support: Support, kept: Tensor, tail: Tensor) -> Tensor:
    """Computes the training loss of each row.

    For truncated rows, this is `soft_cross_entropy`. For drawn entries, it is the sum of -w log q over the
    entries: an unbiased estimate of the cross entropy over the whole vocabulary, with an unbiased gradient (arXiv
    2503.16870).

    Args:
        support: N rows of the target p, with weights w if entries were drawn.
        kept: Logprobs of q at the entries [N, K], as returned by `on_support`.
        tail: Log of q's tail mass [N].

    Returns:
        Float32 [N], nats.
    """
    if support.weights is not None:
        return -(support.weights * kept).sum(-1)
    return soft_cross_entropy(support, kept, tail)
