"""Objectives of training: divergences between the target and the draft, computed on stored rows.

A divergence is a function with three arguments: N rows of the target, the draft's logprobs of their entries [N, K], and
the log of the draft's tail mass [N]. `logitstore.models.support.on_support` returns the last two. The result is one
loss per row, [N], computed with natural logarithms.

On truncated rows, the tail counts as one more token. By the data processing inequality, the divergence on stored rows
is at most the divergence over the whole vocabulary. On rows with drawn entries, every divergence except `reverse_kl`
is estimated with the entries' weights w: the sum over the entries, sum_S w f(q / p), estimates the sum over the
vocabulary, D = sum_v p_v f(q_v / p_v).
docs/objectives.md lists, for each objective and kind of rows, whether the result is exact, a bound or unbiased.

In formulas, p is the target, q the draft, S the kept entries of a row, and p_t and q_t the tail masses of p and q.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.nn.functional import logsigmoid, softplus

from logitstore.errors import nearest
from logitstore.models.support import TAIL_FLOOR, Support, acceptance_estimate, estimated_cross_entropy

if TYPE_CHECKING:
    from torch import Tensor

    from logitstore.format.spec import TargetSpec

Divergence = Callable[[Support, "Tensor", "Tensor"], "Tensor"]

LEAST_ALPHA = 1e-30
"""Smaller estimates of alpha are raised to this value before -log alpha is taken, so that the logarithm is finite."""
MIX_RATE = 3.0
"""Constant in the objective `kl_tv`: the weight of the KL is exp(-MIX_RATE alpha), where alpha is the acceptance
rate."""


def forward_kl(support: Support, kept: Tensor, tail: Tensor) -> Tensor:
    """Computes KL(p‖q) = sum_S p log(p / q) + p_t log(p_t / q_t) of each row (AdaSPEC, arXiv 2510.19779, eq. 6).

    Here p is the target, q the draft, S the kept entries, and p_t, q_t the tail masses. The gradient is that
    of the soft cross entropy. The target's entropy is subtracted so that 0 means p = q.

    Args:
        support: N rows of the target p.
        kept: Logprobs of q at the entries [N, K].
        tail: Log of q's tail mass [N].

    Returns:
        Float32 [N], nats. On truncated rows: a lower bound of the divergence over the whole vocabulary, at least 0
        except for rounding. On drawn rows: an unbiased estimate of that divergence, which can be negative.
    """
    return estimated_cross_entropy(support, kept, tail) - support.entropy()


def reverse_kl(support: Support, kept: Tensor, tail: Tensor) -> Tensor:
    """Computes KL(q‖p) = sum_S q log(q / p) + q_t log(q_t / p_t) of each row. A p_t below 1e-6 is raised to 1e-6.

    Here p is the target, q the draft, S the kept entries, and p_t, q_t the tail masses.

    Drawn rows use the same formula; their tail holds all token ids that were not drawn. The entries' weights are not
    used here. An estimate with these weights would be unbiased, but its variance would have no bound, because tokens
    that only the draft finds likely are rarely drawn from the target.

    The arguments are those of `forward_kl`.

    Returns:
        Float32 [N], nats. On all rows: a lower bound of the divergence over the whole vocabulary.
    """
    used = support.used
    q = kept.exp().where(used, 0.0)
    # Places beyond a row's entries get p = 1, so that no logarithm of 0 occurs; their q is 0.
    inside = (q * (kept - support.probs.where(used, 1.0).log())).sum(-1)
    return inside + tail.exp() * (tail - support.tail.clamp_min(TAIL_FLOOR).log())


def jensen_shannon(beta: float) -> Divergence:
    """Makes the divergence JSD_beta = beta KL(p‖m) + (1 - beta) KL(q‖m), where m = beta p + (1 - beta) q.

    JSD is the Jensen-Shannon divergence (DistillSpec, arXiv 2310.08461); p is the target and q the draft.

    On drawn rows, the estimate subtracts the control variate c (q / p - 1) with c = -(1 - beta) log(1 - beta). The mean
    of the control variate is 0, so the estimate stays unbiased. The remaining terms grow only with log(q / p), so
    tokens that are much likelier under the draft than under the target do not dominate the estimate.

    Args:
        beta: Weight of the target in the mixture m, in (0, 1).

    Returns:
        A divergence with the arguments and the result of `forward_kl`.
    """

    def divergence(support: Support, kept: Tensor, tail: Tensor) -> Tensor:
        used = support.used
        # Places beyond a row's entries get p = q = 1, so that no logarithm of 0 occurs. They do not count below.
        p = support.probs.where(used, 1.0)
        q = kept.exp().where(used, 1.0)
        if support.weights is not None:
            # With r = q / p and x = log r + log((1 - beta) / beta), m / p is beta (1 + e^x). This form avoids
            # the subtraction of nearly equal numbers.
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
    """Computes `TV = 1 - alpha = 1/2 sum |p - q|` of each row: the chance that speculative sampling rejects a token.

    Here p is the target, q the draft, and alpha the acceptance rate. The arguments are those of `forward_kl`.

    Returns:
        Float32 [N]. On truncated rows: a lower bound of TV over the whole vocabulary, in [0, 1]. On drawn rows: an
        unbiased estimate of that TV, which can lie outside [0, 1].
    """
    return 1.0 - acceptance_estimate(support, kept, tail)


def neg_log_alpha(support: Support, kept: Tensor, tail: Tensor) -> Tensor:
    """Computes -log alpha of each row, where alpha = sum min(p, q) is the acceptance rate in speculative sampling.

    On drawn rows, the estimate of alpha is unbiased. The estimate of -log alpha is too large on average, by about
    Var(alpha) / (2 alpha^2).

    The arguments are those of `forward_kl`.

    Returns:
        Float32 [N], nats. On truncated rows: a lower bound of -log alpha over the whole vocabulary.
    """
    return -acceptance_estimate(support, kept, tail).clamp_min(LEAST_ALPHA).log()


def kl_tv(support: Support, kept: Tensor, tail: Tensor) -> Tensor:
    """Computes lambda KL(p‖q) + (1 - lambda) TV of each row. No gradient flows through lambda = exp(-3 alpha).

    Here p is the target, q the draft, alpha the acceptance rate, and TV = 1 - alpha. If alpha is small, the KL
    dominates; its gradient does not vanish where p and q hardly overlap. If alpha is near 1, TV dominates; TV is the
    probability that a token is rejected.

    The arguments and the shape of the result are those of `forward_kl`.
    """
    alpha = acceptance_estimate(support, kept, tail)
    mix = (-MIX_RATE * alpha.detach()).exp()
    return mix * forward_kl(support, kept, tail) + (1.0 - mix) * (1.0 - alpha)


def renormalised_kl(support: Support, kept: Tensor, tail: Tensor) -> Tensor:
    """Computes KL(p'‖q) of each row, where p' is p on the kept entries, scaled to sum to 1; the tail is ignored.

    Here p is the target and q the draft. Most tools train on top-k rows in this way. This function exists only for
    comparison: its minimum is at q = p', which gives the kept entries more probability than p does.

    The arguments and the shape of the result are those of `forward_kl`.
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
"""Names of objectives, as --objective accepts them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """Loss of each row: (1 - label_weight) * divergence + label_weight * label_nll.

    The label is the token that really follows; label_nll is minus the draft's logprob of the label.
    """

    name: str
    """Name of the objective, one of OBJECTIVES."""
    divergence: Divergence | None
    """Divergence between the target and the draft; None if the draft learns only the labels and needs no target.
    Learning only the labels is called sequence-level distillation (Kim and Rush, arXiv 1606.07947) if the target wrote
    the text, and fine-tuning otherwise."""
    label_weight: float
    """Weight of label_nll, in [0, 1]."""

    def check(self, target: TargetSpec | None) -> None:
        """Raises ValueError if this objective cannot be used to train on the rows of a store.

        Args:
            target: Spec of the store's target; None for a store without target rows.
        """
        if self.divergence is None:
            return
        if target is None:
            raise ValueError(
                f"objective must be {LABEL} where the store has no target rows, got objective={self.name}; dump the "
                "target first"
            )
        if self.name == "renormalised_kl" and target.scheme.draws:
            raise ValueError(
                f"objective {self.name} needs truncated rows, got objective={self.name} with "
                f"scheme={target.scheme.name}, whose entries were drawn: the target's likeliest tokens may be missing; "
                "use forward_kl"
            )


def make_objective(name: str, *, beta: float = 0.5, label_weight: float = 0.0) -> Objective:
    """Makes the objective with a given name.

    Args:
        name: Name of the objective, one of OBJECTIVES.
        beta: Weight of the target in the mixture of `jsd`, in (0, 1). Other objectives ignore it.
        label_weight: Weight of the label's loss, in [0, 1]; at 1, the objective becomes `label_nll`.

    Raises:
        ValueError: The name is unknown, or a number is out of its range.
    """
    if name not in OBJECTIVES:
        raise ValueError(
            f"objective must be one of {list(OBJECTIVES)}, got objective={name}{nearest(name, OBJECTIVES)}"
        )
    if not 0.0 < beta < 1.0:
        raise ValueError(f"beta must be between 0 and 1, got beta={beta}; 0.5 is usual")
    if not 0.0 <= label_weight <= 1.0:
        raise ValueError(f"label_weight must be between 0 and 1, got label_weight={label_weight}; 0 is usual")
    # With a label_weight of 1 the divergence has no effect, so the target's rows need not be read.
    if name == LABEL or label_weight == 1.0:
        return Objective(name=LABEL, divergence=None, label_weight=1.0)
    divergence = jensen_shannon(beta) if name == JSD else DIVERGENCES[name]
    return Objective(name=name, divergence=divergence, label_weight=label_weight)
