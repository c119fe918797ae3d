"""Random rows of a target, and dense float64 oracles of the objectives, written directly from their definitions."""

import math

import torch

from logitstore.format.spec import TargetSpec
from logitstore.models.support import Support
from tests.helpers import stores

FLOOR = 1e-6
"""Smaller tail probabilities count as this value (logitstore.models.support.TAIL_FLOOR)."""
KINDS = ("one entry", "a tail", "whole vocabulary", "ragged", "drawn", "hybrid")


def random_rows(kind, num_rows, vocab_size, seed=0):
    """Returns random rows of a kind as a float32 Support. The oracles take its numbers as exact."""
    generator = torch.Generator().manual_seed(seed)
    p = (3 * torch.randn(num_rows, vocab_size, generator=generator, dtype=torch.float64)).softmax(-1)
    if kind in ("drawn", "hybrid"):
        return drawn_rows(kind, p, generator)
    k = {"one entry": 1, "a tail": min(6, vocab_size), "ragged": min(9, vocab_size)}.get(kind, vocab_size)
    probs, token_ids = p.topk(k)
    if kind == "ragged":
        used = torch.arange(k) < torch.randint(1, k + 1, (num_rows, 1), generator=generator)
        probs, token_ids = probs * used, token_ids * used
    tail = torch.zeros(num_rows, dtype=torch.float64) if k == vocab_size else (1 - probs.sum(-1)).clamp_min(0)
    return Support(token_ids=token_ids, probs=probs.float(), tail=tail.float())


def drawn_rows(kind, p, generator, num_draws=12):
    draws = torch.multinomial(p, num_draws, replacement=True, generator=generator)
    counts = torch.zeros_like(p).scatter_add_(1, draws, torch.ones_like(draws, dtype=p.dtype))
    weights = counts / num_draws
    if kind == "hybrid":  # likely tokens keep their probabilities, draws stand for the others
        head = p >= 1 / num_draws
        rest = torch.where(head, 0.0, p)
        lot = torch.rand(p.shape, generator=generator, dtype=p.dtype) < rest * num_draws
        weights = torch.where(head, p, lot / num_draws)
        weights = weights.where(weights.sum(-1, keepdim=True) > 0, counts / num_draws)
    k = int((weights > 0).sum(-1).max()) if len(p) else 1
    kept, token_ids = weights.topk(k)
    used = kept > 0
    probs = p.gather(1, token_ids) * used
    entropy = -(p * p.log()).sum(-1)
    return Support(
        token_ids=token_ids * used, probs=probs.float(), tail=(1 - probs.sum(-1)).float(), weights=kept.float(),
        drawn_entropy=entropy.float(),
    )  # fmt: skip


def buckets(support, row, logits):
    """Returns p and q at the entries of one row, the tail of each, and the weights of the entries; float64."""
    used = support.probs[row] > 0
    ids = support.token_ids[row][used]
    p, q = support.probs[row][used].double(), logits[row].softmax(-1)[ids]
    rest = torch.ones(logits.shape[1], dtype=torch.bool)
    rest[ids] = False
    left = logits[row].softmax(-1)[rest].sum()
    # A smaller value counts as the floor, but keeps its own gradient.
    q_tail = (left.log() + (left.clamp_min(FLOOR).log() - left.log()).detach()).exp() if rest.any() else left + FLOOR
    p_tail = support.tail[row].double()
    weights = None if support.weights is None else support.weights[row][used].double()
    return p, q, p_tail, q_tail, weights


def f_divergence(f, support, row, logits):
    """Returns sum p f(q / p), estimated with the weights of the entries."""
    p, q, _, _, weights = buckets(support, row, logits)
    return (weights * f(q / p)).sum()


def xlogy(a, b):
    return a * b.where(a > 0, 1.0).log()


def forward_kl(support, row, logits):
    p, q, p_tail, q_tail, weights = buckets(support, row, logits)
    if weights is not None:
        return -(weights * q.log()).sum() - support.drawn_entropy[row].double()
    return (p * (p / q).log()).sum() + xlogy(p_tail, p_tail / q_tail)


def reverse_kl(support, row, logits):
    p, q, p_tail, q_tail, _ = buckets(support, row, logits)
    return (q * (q / p).log()).sum() + q_tail * (q_tail / p_tail.clamp_min(FLOOR)).log()


def jsd(beta):
    def of(support, row, logits):
        p, q, p_tail, q_tail, weights = buckets(support, row, logits)
        if weights is not None:
            c = -(1 - beta) * math.log(1 - beta)

            def f(r):
                m = beta + (1 - beta) * r
                return -beta * m.log() + (1 - beta) * r * (r / m).log() - c * (r - 1)

            return f_divergence(f, support, row, logits)
        m, m_tail = beta * p + (1 - beta) * q, beta * p_tail + (1 - beta) * q_tail
        of_p = (p * (p / m).log()).sum() + xlogy(p_tail, p_tail / m_tail)
        of_q = (q * (q / m).log()).sum() + q_tail * (q_tail / m_tail).log()
        return beta * of_p + (1 - beta) * of_q

    return of


def alpha(support, row, logits):
    p, q, p_tail, q_tail, weights = buckets(support, row, logits)
    if weights is not None:
        return (weights * torch.minimum(q / p, torch.ones_like(q))).sum()
    return (torch.minimum(p, q).sum() + torch.minimum(p_tail, q_tail)).clamp(0, 1)


def total_variation(support, row, logits):
    return 1 - alpha(support, row, logits)


def neg_log_alpha(support, row, logits):
    return -alpha(support, row, logits).log()


def kl_tv(support, row, logits):
    mix = math.exp(-3 * float(alpha(support, row, logits).detach()))
    return mix * forward_kl(support, row, logits) + (1 - mix) * total_variation(support, row, logits)


def renormalised_kl(support, row, logits):
    p, q, _, _, _ = buckets(support, row, logits)
    p = p / p.sum()
    return (p * (p / q).log()).sum()


ORACLES = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd(0.3),
    "total_variation": total_variation,
    "neg_log_alpha": neg_log_alpha,
    "kl_tv": kl_tv,
    "renormalised_kl": renormalised_kl,
}
BETA = 0.3


def losses(name, support, logits, labels, label_weight=0.0):
    """Returns the loss of each row, float64 [N], differentiable with respect to float64 `logits`."""
    nll = -logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    if name == "label_nll":
        return nll
    own = [ORACLES[name](support, row, logits) for row in range(len(support))]
    found = torch.stack(own) if own else logits.sum(-1)
    return (1 - label_weight) * found + label_weight * nll


def random_target(scheme):
    return TargetSpec(model=stores.MODEL, scheme=scheme)
