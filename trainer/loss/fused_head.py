"""The LM head and the objective, fused in chunks of rows: neither logits nor their gradient exist whole.

The gradient of a chunk is computed in its forward pass, while its logits are there: an objective sees the kept entries
alone, so that the gradient by the logits is a few numbers a row and a multiple of the softmax. Heads that are no plain
linear layer (LoRA on the head, say) compute each chunk's logits again in the backward pass instead.

N rows, M of them trained on, K entries per row at most, V vocabulary, H hidden size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from logitstore.models.support import (
    TAIL_FLOOR,
    Support,
    acceptance_estimate,
    estimated_cross_entropy,
    log_tail,
    soft_cross_entropy,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from logitstore.models.split_lm import SplitLM
    from trainer.loss.objectives import Objective


LEAST_MASS = 1e-30
"""What is divided by instead, where all tokens but the entries underflow: their gradients are 0 then."""


def rows_at_once(split: SplitLM, hidden: Tensor) -> int:
    """Returns how many rows' logits are made at once.

    Each chunk reads the head and adds to its gradient: of fewer rows than half the hidden size that is what takes the
    time, on a CPU, and the logits of so many are half of the head's own memory.
    """
    return max(split.rows_per_chunk, hidden.shape[-1] // 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowLosses:
    """What the draft loses on M rows: float32 [M] each, without gradient, nats but for alpha."""

    objective: Tensor
    """What is minimised."""
    label_nll: Tensor
    """Minus the draft's logprob of the token that follows."""
    kl: Tensor | None
    """KL(p‖draft); None without a target."""
    alpha: Tensor | None
    """Acceptance as estimated from what is stored; None without a target."""


def train_rows(
    split: SplitLM, hidden: Tensor, support: Support | None, labels: Tensor, weights: Tensor, objective: Objective
) -> tuple[Tensor, RowLosses]:
    """Computes the weighted sum of the losses of rows.

    Args:
        split: The draft.
        hidden: [M, H], what its backbone says; M may be 0.
        support: M rows of the target; None where the objective is of the label alone.
        labels: Int64 [M], the tokens that follow.
        weights: Float32 [M].
        objective: What to minimise.

    Returns:
        Float32 scalar with gradient for `hidden` and the head, which hangs on both also without rows; and its parts.
    """
    size = rows_at_once(split, hidden)
    task = _Task(split=split, support=support, labels=labels, weights=weights, objective=objective, size=size)
    linear = _LinearHead.of(split, hidden)
    if linear is not None:
        head: Any = split.model.get_output_embeddings()
        parts: list[RowLosses] = []
        total: Tensor = _Fused.apply(hidden, head.weight, head.bias, linear, task, parts)  # type: ignore[no-untyped-call]
    else:
        total, parts = _again(hidden, task)
    return total, _joined(parts)


@torch.no_grad()
def look_at_rows(
    split: SplitLM, hidden: Tensor, support: Support | None, labels: Tensor, wanted: Sequence[str]
) -> tuple[dict[str, Tensor], RowLosses]:
    """Says what a selection asks of the draft, in one pass of the head.

    Args:
        split: The draft.
        hidden: [N, H], what its backbone says.
        support: N rows of the target, or None.
        labels: Int64 [N], the tokens that follow.
        wanted: Names of `trainer.loss.selection.LOOKS`.

    Returns:
        [N] by name; and the losses of the rows, whose `objective` is the label's.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in wanted}
    parts = []
    logits_of = _LinearHead.of(split, hidden) or split.logits
    for rows in _chunks(len(hidden), rows_at_once(split, hidden)):
        part, values = None if support is None else support[rows], logits_of(hidden[rows])
        if "draft_likeliest" in found:
            found["draft_likeliest"].append(values.argmax(-1))
        values -= values.amax(-1, keepdim=True)
        kept = None if part is None else values.gather(1, part.token_ids)
        label = values.gather(1, labels[rows, None])
        shifted = values.clone() if "draft_entropy" in found else None
        probs = values.exp_()
        mass = probs.sum(-1, keepdim=True)
        log_mass = mass.log()
        label = (label - log_mass)[:, 0]
        if shifted is not None:
            found["draft_entropy"].append((log_mass - torch.linalg.vecdot(probs, shifted)[:, None] / mass)[:, 0])
        if "draft_label_nll" in found:
            found["draft_label_nll"].append(-label)
        tail = None
        if part is not None and kept is not None:
            kept = (kept - log_mass).where(part.used, 0.0)
            tail = log_tail(kept, part)
            if "draft_ce" in found:
                found["draft_ce"].append(soft_cross_entropy(part, kept, tail))
        parts.append(_losses(-label, -label, part, kept, tail))
    return {name: torch.cat(values) for name, values in found.items()}, _joined(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class _LinearHead:
    """A head that is a plain linear layer: makes the logits of chunks, one after another in the same memory."""

    split: SplitLM
    weight: Tensor
    """[V, H], in what matrix products are made in."""
    bias: Tensor | None
    """Float32 [V]"""
    room: Tensor
    """[n, V]"""

    @staticmethod
    def of(split: SplitLM, hidden: Tensor) -> _LinearHead | None:
        """Prepares for hidden states [N, H]; None where the head is another."""
        head, vocab_size = split.model.get_output_embeddings(), split.vocab_size
        if type(head) is not nn.Linear:
            return None
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        return _LinearHead(
            split=split,
            weight=head.weight[:vocab_size].detach().to(dtype),
            bias=None if head.bias is None else head.bias[:vocab_size].detach().float(),
            room=hidden.new_empty(min(len(hidden), rows_at_once(split, hidden)), vocab_size, dtype=dtype),
        )

    def __call__(self, hidden: Tensor) -> Tensor:
        """Returns logits, float32 [n, V], of hidden states [n, H]; good until the next call."""
        return self.with_slope(hidden)[0]

    def with_slope(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns logits, and under soft-capping their derivative by what went in, [n, V]."""
        with torch.autocast(hidden.device.type, enabled=False):
            values = torch.mm(hidden.to(self.weight.dtype), self.weight.T, out=self.room[: len(hidden)]).float()
        slope = None
        if self.bias is not None:
            values += self.bias
        if self.split.scale != 1.0:
            values *= self.split.scale
        if self.split.softcap is not None:
            values.div_(self.split.softcap).tanh_()
            slope = 1.0 - values.square()
            values *= self.split.softcap
        return values, slope


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """What is to be done with M rows."""

    split: SplitLM
    support: Support | None
    labels: Tensor
    weights: Tensor
    objective: Objective
    size: int
    """Rows of a chunk."""

    def chunks(self) -> Iterator[slice]:
        return _chunks(len(self.labels), self.size)

    def part(self, rows: slice) -> Support | None:
        return None if self.support is None else self.support[rows]

    def losses(self, part: Support | None, kept: Tensor | None, tail: Tensor | None, label: Tensor) -> Tensor:
        """Returns what is minimised at n rows, from logprobs of their entries [n, K], tails [n] and labels [n]."""
        share, divergence = self.objective.label_weight, self.objective.divergence
        if divergence is None or part is None or kept is None or tail is None:
            return -label
        losses = divergence(part, kept, tail)
        return losses if share == 0.0 else (1.0 - share) * losses - share * label


class _Fused(torch.autograd.Function):
    """hidden [M, H], a linear head -> the weighted sum of M losses. Appends their parts to a list."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: _LinearHead,
        task: _Task,
        parts: list[RowLosses],
    ) -> Tensor:
        # of many chunks a sum in bfloat16 would lose what each adds
        of_weight = torch.zeros(weight.shape, device=weight.device) if ctx.needs_input_grad[1] else None
        of_bias = None if bias is None else torch.zeros(bias.shape, device=bias.device)
        of_hidden = torch.empty_like(hidden)
        total = torch.zeros((), device=hidden.device)
        vocab_size, dtype = len(head.weight), head.weight.dtype
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in task.chunks():
                loss, part, of_product = _chunk(head, hidden[rows], task, rows)
                total += loss
                parts.append(part)
                of_product = of_product.to(dtype)
                of_hidden[rows] = of_product @ head.weight
                if of_weight is not None:
                    _add_product(of_weight[:vocab_size], of_product, hidden[rows].to(dtype))
                if of_bias is not None:
                    of_bias[:vocab_size] += of_product.sum(0, dtype=torch.float32)
        ctx.gradients = (
            of_hidden,
            None if of_weight is None else of_weight.to(weight.dtype),
            None if of_bias is None or bias is None else of_bias.to(bias.dtype),
        )
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_total: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        gradients, ctx.gradients = ctx.gradients, None  # given away, not kept
        scaled = (None if gradient is None else gradient.mul_(of_total) for gradient in gradients)
        return (*scaled, None, None, None)


def _chunk(head: _LinearHead, hidden: Tensor, task: _Task, rows: slice) -> tuple[Tensor, RowLosses, Tensor]:
    """Computes the losses of n rows and their gradient, in the memory of the logits where that is float32.

    Args:
        head: Makes their logits.
        hidden: [n, H].
        task: Of which this is a part.
        rows: Which.

    Returns:
        The weighted sum of the losses, the losses, and the sum's gradient by what the linear layer says, float32
        [n, V].
    """
    part, weights, labels = task.part(rows), task.weights[rows], task.labels[rows, None]
    values, slope = head.with_slope(hidden)
    values -= values.amax(-1, keepdim=True)
    # what the objective needs of the logits, before their memory becomes the softmax's, and then its gradient's
    label = values.gather(1, labels)
    kept, places = None, None
    if part is None:
        mass = rest = values.exp_().sum(-1, keepdim=True)
    else:
        # places beyond a row's entries repeat its first
        places = part.token_ids.where(part.used, part.token_ids[:, :1])
        kept = values.gather(1, places)
        # summed without the entries: 1 minus theirs would be nothing but rounding where the tail is small
        rest = values.exp_().scatter_(1, places, 0.0).sum(-1, keepdim=True)
        mass = rest + kept.exp().where(part.used, 0.0).sum(-1, keepdim=True)
        kept = (kept - mass.log()).where(part.used, 0.0)
    label = (label - mass.log())[:, 0]
    tail = (rest / mass).clamp_min(TAIL_FLOOR).log()[:, 0]
    losses, of_kept, of_tail, of_label = _by_entries(task, part, kept, tail, label, weights)

    # Of logprobs: log q_k = z_k - log sum exp z, by z_v 1[k = v] - q_v. Of the tail's: log q_t = log sum_T exp z - log
    # sum exp z, by z_v 1[v in T] q_v / q_t - q_v, also where q_t is too small to count.
    if part is None or kept is None or places is None or of_kept is None:
        gradient = values.mul_(-of_label / mass)
    else:
        of_all = of_label + of_tail + of_kept.sum(-1, keepdim=True)
        gradient = values.mul_(of_tail / rest.clamp_min(LEAST_MASS) - of_all / mass)
        own = of_kept - of_all * kept.exp()
        gradient.scatter_(1, places, own.where(part.used, own[:, :1]))
    gradient.scatter_add_(1, labels, of_label)
    if slope is not None:
        gradient *= slope
    if task.split.scale != 1.0:
        gradient *= task.split.scale
    return (losses * weights).sum(), _losses(losses, -label, part, kept, tail), gradient


def _by_entries(
    task: _Task, part: Support | None, kept: Tensor | None, tail: Tensor, label: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Returns losses [n], and the gradient of their weighted sum by logprobs: of entries, of the tail, of labels.

    [n, K] or None without entries; [n, 1]; [n, 1].
    """
    of_label = -(task.objective.label_weight * weights)[:, None]
    if task.objective.divergence is None or part is None or kept is None:
        return -label, None if kept is None else torch.zeros_like(kept), torch.zeros_like(of_label), of_label
    with torch.enable_grad():
        entries, others = kept.detach().requires_grad_(), tail.detach().requires_grad_()
        losses = task.losses(part, entries, others, label)
        of_kept, of_tail = torch.autograd.grad(losses, (entries, others), weights, allow_unused=True)
    of_tail = torch.zeros_like(of_label) if of_tail is None else of_tail[:, None]
    return losses.detach(), of_kept, of_tail, of_label


def _add_product(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """Adds gradient.T @ hidden to the head's gradient, [V, H]."""
    if gradient.dtype == total.dtype:
        total.addmm_(gradient.T, hidden)
    else:
        total += gradient.T @ hidden


def _again(hidden: Tensor, task: _Task) -> tuple[Tensor, list[RowLosses]]:
    """Does as `_Fused` for any head: the logits of a chunk are computed again in the backward pass."""

    def losses(hidden: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        logprobs = task.split.logits(hidden).log_softmax(-1)
        part, label = task.part(rows), logprobs.gather(1, task.labels[rows, None])[:, 0]
        kept, tail = (None, None) if part is None else (_entries(logprobs, part), _tail(logprobs, part))
        seen = (None, None) if kept is None or tail is None else (kept.detach(), tail.detach())
        return task.losses(part, kept, tail, label), label.detach(), *seen

    total, parts = torch.zeros((), device=hidden.device), []
    for rows in task.chunks():
        found, label, kept, tail = checkpoint(losses, hidden[rows], rows, use_reentrant=False, preserve_rng_state=False)
        total = total + (found * task.weights[rows]).sum()
        parts.append(_losses(found.detach(), -label, task.part(rows), kept, tail))
    return total, parts


def _entries(logprobs: Tensor, part: Support) -> Tensor:
    """Returns logprobs of the entries, [n, K], 0 beyond a row's."""
    return logprobs.gather(1, part.token_ids).where(part.used, 0.0)


def _tail(logprobs: Tensor, part: Support) -> Tensor:
    """Returns the log of what all other tokens have, [n], of TAIL_FLOOR at least; its gradient is that of the sum."""
    places = part.token_ids.where(part.used, part.token_ids[:, :1])
    mass = logprobs.exp().scatter(1, places, 0.0).sum(-1)
    tail = mass.clamp_min(LEAST_MASS).log()
    return tail + (tail.clamp_min(math.log(TAIL_FLOOR)) - tail).detach()


def _chunks(num_rows: int, size: int) -> Iterator[slice]:
    """Yields at least one chunk: what is computed of no rows hangs on every parameter too."""
    for start in range(0, max(1, num_rows), size):
        yield slice(start, start + size)


def _losses(
    objective: Tensor, label_nll: Tensor, part: Support | None, kept: Tensor | None, tail: Tensor | None
) -> RowLosses:
    if part is None or kept is None or tail is None:
        return RowLosses(objective=objective, label_nll=label_nll, kl=None, alpha=None)
    kl = estimated_cross_entropy(part, kept, tail) - part.entropy()
    return RowLosses(objective=objective, label_nll=label_nll, kl=kl, alpha=acceptance_estimate(part, kept, tail))


def _joined(parts: list[RowLosses]) -> RowLosses:
    def join(name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    return RowLosses(**{name: join(name) for name in RowLosses.__slots__})  # type: ignore[arg-type]
