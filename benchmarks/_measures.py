"""Losses of formats in each row compared with the exact distribution, with the same measures for all formats.

The measures need only the entries and a few numbers of each whole distribution, so a dozen formats cost little more
than one. Sums are in float64.

N rows, K entries of a row at most, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from logitstore.models.support import TAIL_FLOOR

if TYPE_CHECKING:
    from logitstore.rows.rows import Rows

SMALLEST = 1e-45


@dataclass(frozen=True, kw_only=True)
class Exact:
    """N distributions of the target and of a draft."""

    logprobs: torch.Tensor
    """Float32 [N, V]."""
    p: torch.Tensor
    """Float32 [N, V]."""
    q: torch.Tensor
    """Float32 [N, V]."""
    entropy: torch.Tensor
    alpha: torch.Tensor
    pp: torch.Tensor
    pq: torch.Tensor
    qq: torch.Tensor

    @staticmethod
    def of(logprobs, draft):
        def total(values):
            return values.sum(-1, dtype=torch.float64)

        # With 128,256 tokens, a float32 log_softmax sums to 1 only within 1e-4, which is as large as the KL of codes.
        logprobs = logprobs - total(logprobs.exp()).log().float()[:, None]
        p, q = logprobs.exp(), draft.exp()
        return Exact(
            logprobs=logprobs, p=p, q=q, entropy=-total(p * logprobs), alpha=total(torch.minimum(p, q)),
            pp=total(p * p), pq=total(p * q), qq=total(q * q),
        )  # fmt: skip

    def gradient(self):
        """Returns the gradient of full distillation by the logits, summed over the rows, float64 [V]."""
        return (self.q - self.p).sum(0, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """N rows as training uses them."""

    kind: Literal["bucket", "renormalised", "drawn"]
    """How the tail is represented: as one more bucket, not at all, or by the drawn entries."""
    token_ids: torch.Tensor
    """Int64 [N, K]; 0 beyond a row's entries."""
    weights: torch.Tensor
    """Float64 [N, K]: weights in the loss; 0 beyond a row's entries."""
    probs: torch.Tensor | None
    """Float64 [N, K]: stored probabilities of the entries; None for formats that store only draws."""
    tail: torch.Tensor
    """Float64 [N]: stored mass of the tail."""

    @staticmethod
    def of_rows(rows: Rows, start, stop):
        """Makes it from rows of logitstore, as the trainer uses them."""
        places = torch.arange(start, stop).numpy()
        stored = rows.padded(places)
        return Seen(
            kind="bucket" if rows.weights is None else "drawn",
            token_ids=torch.from_numpy(stored.token_ids),
            weights=torch.from_numpy(stored.probs if stored.weights is None else stored.weights).double(),
            probs=torch.from_numpy(stored.probs).double(),
            tail=torch.from_numpy(stored.tail).double(),
        )

    @staticmethod
    def of_truncated(token_ids, logprobs):
        """Makes it from rectangular top-k arrays, which are renormalised for training.

        Alpha is estimated with the missing mass as a tail bucket, which the readers of these formats do not do.
        """
        probs = torch.as_tensor(logprobs).double().exp()
        mass = probs.sum(-1, keepdim=True)
        return Seen(
            kind="renormalised", token_ids=torch.as_tensor(token_ids), weights=probs / mass, probs=probs,
            tail=(1 - mass[:, 0]).clamp_min(0.0),
        )  # fmt: skip


def compare(exact: Exact, seen: Seen):
    """Compares N rows with the exact distributions.

    Returns:
        Measures by name, float64 [N], and the sum of the gradients by the logits, float64 [V]. The measures are
        kl_codes, the loss by rounding in nats; kl_tail, the loss of the tail: spread evenly within the bucket, or
        -log of the kept mass if the tail is dropped; tv, half the L1 distance between the weights and p; the estimate
        of alpha and its error; the angle in degrees between the row's gradient and that of full distillation.
    """
    used = seen.weights > 0
    p = exact.p.gather(1, seen.token_ids).double().where(used, 0.0)
    q = exact.q.gather(1, seen.token_ids).double().where(used, 0.0)
    logp = exact.logprobs.gather(1, seen.token_ids).double().where(used, 0.0)
    left = (1 - p.sum(-1)).clamp_min(0.0)
    values = {"entries": used.sum(-1).double(), "mass": p.sum(-1), "alpha_exact": exact.alpha}
    if seen.kind == "drawn":
        values["tv"] = ((seen.weights - p).abs().sum(-1) + left) / 2
    else:
        values["kl_tail"] = _tail_loss(exact, seen, p, logp, left, used)
    if seen.probs is not None:
        values["kl_codes"] = _code_loss(seen, p, logp, left, used)
    q_tail = 1 - q.sum(-1)
    values["alpha"] = _alpha(seen, q, q_tail.clamp_min(TAIL_FLOOR), used)
    values["alpha_error"] = (values["alpha"] - exact.alpha).abs()
    bucket = seen.tail if seen.kind == "bucket" else torch.zeros_like(seen.tail)
    # The gradient by the logits is total * q - weights at the entries, and rest * q at all other tokens.
    total = seen.weights.sum(-1) + bucket
    rest = total - torch.where(q_tail > TAIL_FLOOR, bucket / q_tail.clamp_min(TAIL_FLOOR), 0.0)
    found = (total[:, None] * q - seen.weights).where(used, 0.0)
    dot = ((q - p) * found).sum(-1) + rest * (exact.qq - exact.pq - ((q - p) * q).sum(-1))
    square = found.square().sum(-1) + rest.square() * (exact.qq - q.square().sum(-1))
    wanted = exact.qq - 2 * exact.pq + exact.pp
    cosine = dot / (square * wanted).clamp_min(SMALLEST).sqrt()
    values["angle_row"] = torch.rad2deg(cosine.clamp(-1, 1).acos())
    gradient = (rest.float() @ exact.q).double()
    gradient.index_add_(0, seen.token_ids.flatten(), (found - rest[:, None] * q).where(used, 0.0).flatten())
    return values, gradient


def _tail_loss(exact, seen, p, logp, left, used):
    if seen.kind == "renormalised":
        return -p.sum(-1).log()
    others = (exact.p.shape[1] - used.sum(-1)).clamp_min(1)
    return -exact.entropy - (p * logp).sum(-1) - torch.xlogy(left, left / others)


def _code_loss(seen, p, logp, left, used):
    if seen.kind == "renormalised":
        mass = p.sum(-1)
        return (p * (logp - seen.weights.where(used, 1.0).log())).sum(-1) / mass - mass.log()
    kept = (p * (logp - seen.probs.where(used, 1.0).log())).sum(-1)
    return kept + torch.xlogy(left, left) - torch.xlogy(left, seen.tail.clamp_min(SMALLEST))


def _alpha(seen, q, q_tail, used):
    if seen.probs is None:
        return torch.minimum(seen.weights, q).sum(-1)
    if seen.kind == "drawn":
        return (seen.weights * (q / seen.probs.where(used, 1.0)).clamp_max(1.0)).sum(-1)
    return torch.minimum(seen.probs, q).sum(-1) + torch.minimum(seen.tail, q_tail)


def angle(a, b):
    """Returns the angle between two vectors in degrees."""
    return torch.rad2deg((a @ b / (a.norm() * b.norm())).clamp(-1, 1).acos()).item()
