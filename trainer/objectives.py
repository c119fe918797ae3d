"""Divergences between the target and the draft on the truncated support, the tail as one more bucket.

An objective is a function of N rows of the target, the draft's logprobs of their entries [N, K] and the log of the
draft's tail mass [N], as `logitstore.support.on_support` returns them; it returns one loss per row, [N], nats.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from logitstore.support import Support, soft_cross_entropy

if TYPE_CHECKING:
    from torch import Tensor

Objective = Callable[[Support, "Tensor", "Tensor"], "Tensor"]


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
    return soft_cross_entropy(support, kept, tail) - support.entropy()


OBJECTIVES: dict[str, Objective] = {"forward_kl": forward_kl}
"""By the name that --objective takes."""
