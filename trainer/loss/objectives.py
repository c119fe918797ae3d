"""Divergences between the target and the draft on stored rows: what each row of a draft is trained on.

A divergence is a function of N rows of the target, the draft's logprobs of their entries [N, K] and the log of the
draft's tail mass [N], as `logitstore.models.support.on_support` returns them; it returns one loss per row, [N], nats.

Where rows are truncated it is taken between the kept entries and the tail as one more bucket, which by the data
processing inequality is at most that over the vocabulary. Where entries were drawn all but one are estimated by their
weights: D = sum_v p_v f(q_v / p_v) by sum_S w f(q / p). docs/objectives.md says which is exact, a bound or unbiased on
which rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.nn.functional import logsigmoid, softplus

from logitstore.models.support import TAIL_FLOOR, Support, acceptance_estimate, estimated_cross_entropy

if TYPE_CHECKING:
    from torch import Tensor

    from logitstore.format.spec import TargetSpec

Divergence = Callable[[Support, "Tensor", "Tensor"], "Tensor"]

LEAST_ALPHA = 1e-30
"""What -log alpha takes an acceptance of 0 for."""
MIX_RATE = 3.0
"""Of the lambda of `kl_tv`: lambda = exp(-MIX_RATE alpha)."""


def forward_kl(support: Support, kept: Tensor, tail: Tensor) -> Tensor:
    """Computes KL(p‖q) = sum_S p log(p / q) + p_t log(p_t / q_t) of each row (AdaSPEC, arXiv 2510.19779, eq. 6).

    Its gradient is that of the soft cross entropy; the target's entropy is taken off so that 0 means equal.

    Args:
        support: N rows of the target p.
        kept: Logprobs of q at the entries [N, K].
        tail: Log of q's tail mass [N].

    Returns:
        Float32 [N], nats. Where rows are truncated at least 0 but for rounding, and a lower bound of the divergence
        over the whole vocabulary; where entries were drawn an unbiased estimate of it, of either sign.
    """
    return estimated_cross_entropy(support, kept, tail) - support.entropy()


def reverse_kl(support: Support, kept: Tensor, tail: Tensor) -> Tensor:
    """Computes KL(q‖p) = sum_S q log(q / p) + q_t log(q_t / p_t) of each row; p_t counts as 1e-6 at least.

    Of drawn entries too it is this bound, the ids that were missed as one bucket: an estimate by weights would be
    unbiased, but of unbounded variance, since draws of the target hardly ever come where the draft alone is.

    Args and returns: As `forward_kl`; a lower bound of the divergence over the whole vocabulary.
    """
    used = support.used
    q = kept.exp().where(used, 0.0)
    inside = (q * (kept - support.probs.where(used, 1.0).log())).sum(-1)
    return inside + tail.exp() * (tail - support.tail.clamp_min(TAIL_FLOOR).log())


def jensen_shannon(beta: float) -> Divergence:
    """Makes JSD_beta = beta KL(p‖m) + (1 - beta) KL(q‖m) with m = beta p + (1 - beta) q (DistillSpec, 2310.08461).

    Where entries were drawn c (q / p - 1), which is 0 on average, is taken off with c = -(1 - beta) log(1 - beta): what
    is left grows with log(q / p) alone, so that tokens the draft likes better than the target do not rule the estimate.

    Args:
        beta: In (0, 1).
    """

    def divergence(support: Support, kept: Tensor, tail: Tensor) -> Tensor:
        used = support.used
        p = support.probs.where(used, 1.0)
        q = kept.exp().where(used, 1.0)
        if support.weights is not None:
            # with r = q / p and x = log r + log((1 - beta) / beta): m / p = beta (1 + e^x), nothing cancels
            x = kept - p.log() + math.log((1 - beta) / beta)
            value = -beta * (math.log(beta) + softplus(x)) + (1 - beta) * (q / p * logsigmoid(x) - math.log1p(-beta))
            return (support.weights * value).sum(-1)
        log_m = (beta * p + (1 - beta) * q).log()
        inside = beta * p * (p.log() - log_m) + (1 - beta) * q * (kept - log_m)
        p_tail, q_tail = support.tail, tail.exp()
        log_m_tail = (beta * p_tail + (1 - beta) * q_tail).log()
        outside = beta * p_tail * (p_tail.clamp_min(TAIL_FLOOR).log() - log_m_tail)
        return inside.where(used, 0.0).sum(-1) + outside + (1 - beta) * q_tail * (tail - log_m_tail)

    return divergence


def total_variation(support: Support, kept: Tensor, tail: Tensor) -> Tensor:
    """Computes TV = 1 - alpha = 1/2 sum |p - q| of each row: what speculative sampling rejects.

    Args and returns: As `forward_kl`, at most 1 where rows are truncated.
    """
    return 1.0 - acceptance_estimate(support, kept, tail)


def neg_log_alpha(support: Support, kept: Tensor, tail: Tensor) -> Tensor:
    """Computes -log alpha of each row.

    Where entries were drawn it is that of an unbiased estimate, and so too large by Var / (2 alpha^2) on average.

    Args and returns: As `forward_kl`.
    """
    return -acceptance_estimate(support, kept, tail).clamp_min(LEAST_ALPHA).log()


def kl_tv(support: Support, kept: Tensor, tail: Tensor) -> Tensor:
    """Computes lambda KL(p‖q) + (1 - lambda) TV of each row, lambda = exp(-3 alpha) without gradient.

    Far from the target it is the KL, whose gradient reaches everywhere; near to it what is rejected.

    Args and returns: As `forward_kl`.
    """
    alpha = acceptance_estimate(support, kept, tail)
    mix = (-MIX_RATE * alpha.detach()).exp()
    return mix * forward_kl(support, kept, tail) + (1.0 - mix) * (1.0 - alpha)


def renormalised_kl(support: Support, kept: Tensor, tail: Tensor) -> Tensor:
    """Computes KL(p'‖q) with p' the kept entries scaled to 1 and no tail, as most tools train on a top-k.

    For comparison only: its minimiser is p', which has more of the head than p.

    Args and returns: As `forward_kl`.
    """
    mass = support.probs.sum(-1, keepdim=True)
    p = support.probs / mass
    return (p * (support.probs.where(support.used, 1.0).log() - mass.log() - kept)).where(support.used, 0.0).sum(-1)


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "total_variation": total_variation,
    "neg_log_alpha": neg_log_alpha,
    "kl_tv": kl_tv,
    "renormalised_kl": renormalised_kl,
}
LABEL, JSD = "label_nll", "jsd"
OBJECTIVES = ("forward_kl", "reverse_kl", JSD, "total_variation", "neg_log_alpha", "kl_tv", "renormalised_kl", LABEL)
"""What --objective takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What is minimised at each row that counts: (1 - label_weight) divergence + label_weight label_nll."""

    name: str
    divergence: Divergence | None
    """None where the label alone is learnt, and no target is needed: ordinary fine-tuning, or, on text that the target
    wrote, sequence-level distillation (Kim and Rush, 1606.07947)."""
    label_weight: float
    """Share of minus the draft's logprob of the token that really follows, in [0, 1]."""

    def check(self, target: TargetSpec | None) -> None:
        """Raises ValueError if rows of such a target cannot be trained on so; None is a store without a target."""
        if self.divergence is None:
            return
        if target is None:
            raise ValueError(
                f"objective must be {LABEL} where the store has no target rows, got objective={self.name}; dump the "
                "target first"
            )
        if self.name == "renormalised_kl" and target.scheme.draws:
            raise ValueError(
                f"objective must be another where entries were drawn, got objective={self.name} with "
                f"scheme={target.scheme.name}: draws stand for the whole distribution, and the likeliest may be "
                "missing; give forward_kl"
            )


def make_objective(name: str, *, beta: float = 0.5, label_weight: float = 0.0) -> Objective:
    """Makes an objective.

    Args:
        name: One of OBJECTIVES.
        beta: Of `jsd`, in (0, 1); the others do without.
        label_weight: Share of the label's own loss, in [0, 1].

    Raises:
        ValueError: One of them is out of its range.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"objective must be one of {list(OBJECTIVES)}, got objective={name}")
    if not 0.0 < beta < 1.0:
        raise ValueError(f"beta must be between 0 and 1, got beta={beta}; 0.5 is usual")
    if not 0.0 <= label_weight <= 1.0:
        raise ValueError(f"label_weight must be between 0 and 1, got label_weight={label_weight}; 0 is usual")
    if name == LABEL or label_weight == 1.0:
        return Objective(name=LABEL, divergence=None, label_weight=1.0)
    divergence = jensen_shannon(beta) if name == JSD else DIVERGENCES[name]
    return Objective(name=name, divergence=divergence, label_weight=label_weight)
