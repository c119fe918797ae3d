"""Computes the LM head and the objective together, chunk by chunk, so that only the logits of one chunk are in memory.

The gradient of a chunk is computed in the forward pass, while the chunk's logits are in memory. This is cheap because
an objective depends only on the logprobs of the label, the kept entries and the tail. Its gradient with respect to the
logits is therefore a multiple of the softmax, plus a few numbers per row. If the head is not a plain linear layer (LoRA
on the head, for example), the backward pass computes the logits of each chunk again instead.

In shapes: N rows, M rows that are trained on, n rows in a chunk, at most K entries in a row, vocabulary size V, hidden
size H. `grad_x` is the gradient of the weighted sum of the losses with respect to x.
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
"""If the draft's mass outside the entries is below this value, this value is used in divisions and logarithms instead.
If the mass underflows to 0, the gradient of the tokens outside the entries is then 0."""


def rows_at_once(split: SplitLM, hidden: Tensor) -> int:
    """Returns the number of rows in a chunk, for hidden states [N, H].

    Each chunk reads the head's weight, and adds to the weight's gradient. On a CPU, these two passes over memory take
    most of the time if a chunk has fewer than H / 2 rows. With H / 2 rows, the logits are half as large.
    """
    return max(split.rows_per_chunk, hidden.shape[-1] // 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowLosses:
    """Losses of the draft on M rows: float32 [M] each, without gradient; in nats, except alpha."""

    objective: Tensor
    """Loss that is minimised."""
    label_nll: Tensor
    """Minus the draft's logprob of the label, the token that follows."""
    kl: Tensor | None
    """KL(p‖draft) on the stored support; None without a target."""
    alpha: Tensor | None
    """Acceptance rate in speculative sampling, estimated from the stored entries; None without a target."""


def train_rows(
    split: SplitLM, hidden: Tensor, support: Support | None, labels: Tensor, weights: Tensor, objective: Objective
) -> tuple[Tensor, RowLosses]:
    """Computes the weighted sum of the losses of M rows.

    Args:
        split: The draft.
        hidden: [M, H], output of the draft's backbone at the rows; M may be 0.
        support: M rows of the target; None if the objective uses the label alone and no target is read.
        labels: Int64 [M], token that follows each row.
        weights: Float32 [M], weight of each row.
        objective: Loss to minimise.

    Returns:
        The weighted sum, a float32 scalar in nats; and the losses of the rows. The sum has a gradient for `hidden` and
        the head's parameters even if M is 0, because data-parallel training expects a gradient for every parameter.
    """
    size = rows_at_once(split, hidden)
    task = _Task(split=split, support=support, labels=labels, weights=weights, objective=objective, size=size)
    linear = _LinearHead.of(split, hidden)
    if linear is not None:
        head: Any = split.model.get_output_embeddings()
        parts: list[RowLosses] = []
        total: Tensor = _Fused.apply(hidden, head.weight, head.bias, linear, task, parts)  # type: ignore[no-untyped-call]
    else:
        total, parts = _recomputed(hidden, task)
    return total, _joined(parts)


@torch.no_grad()
def look_at_rows(
    split: SplitLM, hidden: Tensor, support: Support | None, labels: Tensor, wanted: Sequence[str]
) -> tuple[dict[str, Tensor], RowLosses]:
    """Computes the values that a selection needs from the draft, in one pass of the head without a gradient.

    Args:
        split: The draft.
        hidden: [N, H], output of the draft's backbone at the rows.
        support: N rows of the target; None without a target.
        labels: Int64 [N], token that follows each row.
        wanted: Names of the values to compute, from `trainer.loss.selection.LOOKS`.

    Returns:
        The values, [N] each, keyed by name; and the losses of the rows, with `objective` equal to `label_nll`.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in wanted}
    parts = []
    logits_of = _LinearHead.of(split, hidden) or split.logits
    for rows in _chunks(len(hidden), rows_at_once(split, hidden)):
        part, values = None if support is None else support[rows], logits_of(hidden[rows])
        if "draft_likeliest" in found:
            found["draft_likeliest"].append(values.argmax(-1))
        # Logits are shifted so that exp cannot overflow. Logits needed later are copied before exp_ overwrites them.
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
    """Plain linear head. To save memory, the logits of each chunk overwrite the logits of the chunk before it."""

    split: SplitLM
    weight: Tensor
    """[V, H], weight of the head, in the dtype of the matrix products."""
    bias: Tensor | None
    """Float32 [V], bias of the head; None if the head has no bias."""
    buffer: Tensor
    """[n, V], memory for the logits of the largest chunk."""

    @staticmethod
    def of(split: SplitLM, hidden: Tensor) -> _LinearHead | None:
        """Returns the draft's head for hidden states [N, H]; None if the head is not a plain linear layer."""
        head, vocab_size = split.model.get_output_embeddings(), split.vocab_size
        # A subclass of nn.Linear may compute something else.
        if type(head) is not nn.Linear:
            return None
        device = hidden.device.type
        # The matrix products run with autocast turned off, so autocast's dtype is applied here.
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        return _LinearHead(
            split=split,
            weight=head.weight[:vocab_size].detach().to(dtype),
            bias=None if head.bias is None else head.bias[:vocab_size].detach().float(),
            buffer=hidden.new_empty(min(len(hidden), rows_at_once(split, hidden)), vocab_size, dtype=dtype),
        )

    def __call__(self, hidden: Tensor) -> Tensor:
        """Returns the logits, float32 [n, V], of hidden states [n, H]. The next call may overwrite these logits."""
        return self.with_slope(hidden)[0]

    def with_slope(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the logits [n, V], and the derivative of the soft cap at each logit (None without a soft cap)."""
        with torch.autocast(hidden.device.type, enabled=False):
            values = torch.mm(hidden.to(self.weight.dtype), self.weight.T, out=self.buffer[: len(hidden)]).float()
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
    """Arguments of one call of `train_rows`: the rows and the objective."""

    split: SplitLM
    support: Support | None
    labels: Tensor
    weights: Tensor
    objective: Objective
    size: int
    """Number of rows in a chunk."""

    def chunks(self) -> Iterator[slice]:
        return _chunks(len(self.labels), self.size)

    def part(self, rows: slice) -> Support | None:
        return None if self.support is None else self.support[rows]

    def losses(self, part: Support | None, kept: Tensor | None, tail: Tensor | None, label: Tensor) -> Tensor:
        """Returns the objective [n] of a chunk from logprobs of the draft: entries [n, K], tail [n] and label [n]."""
        share, divergence = self.objective.label_weight, self.objective.divergence
        if divergence is None or part is None or kept is None or tail is None:
            return -label
        losses = divergence(part, kept, tail)
        return losses if share == 0.0 else (1.0 - share) * losses - share * label


class _Fused(torch.autograd.Function):
    """Weighted sum of M losses, from hidden states [M, H] and a linear head. Appends the chunks' losses to `parts`."""

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
        # Float32, because a sum over many chunks in bfloat16 would lose the small contribution of each chunk.
        grad_weight = torch.zeros(weight.shape, device=weight.device) if ctx.needs_input_grad[1] else None
        grad_bias = None if bias is None else torch.zeros(bias.shape, device=bias.device)
        grad_hidden = torch.empty_like(hidden)
        total = torch.zeros((), device=hidden.device)
        vocab_size, dtype = len(head.weight), head.weight.dtype
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in task.chunks():
                loss, part, grad_product = _chunk(head, hidden[rows], task, rows)
                total += loss
                parts.append(part)
                grad_product = grad_product.to(dtype)
                grad_hidden[rows] = grad_product @ head.weight
                if grad_weight is not None:
                    _add_product(grad_weight[:vocab_size], grad_product, hidden[rows].to(dtype))
                if grad_bias is not None:
                    grad_bias[:vocab_size] += grad_product.sum(0, dtype=torch.float32)
        ctx.gradients = (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        )
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        # The gradients are scaled in place and handed to autograd. The context drops them, so that memory can be freed.
        gradients, ctx.gradients = ctx.gradients, None
        scaled = (None if gradient is None else gradient.mul_(grad_total) for gradient in gradients)
        return (*scaled, None, None, None)


def _chunk(head: _LinearHead, hidden: Tensor, task: _Task, rows: slice) -> tuple[Tensor, RowLosses, Tensor]:
    """Computes the losses of a chunk and their gradient. The gradient overwrites the logits if these are float32.

    Args:
        head: The linear head.
        hidden: [n, H], hidden states of the chunk.
        task: Rows of all chunks, and the objective.
        rows: Slice that selects the chunk's rows from the rows of `task`.

    Returns:
        The weighted sum of the losses; the losses; the gradient of that sum with respect to the head's linear output,
        float32 [n, V].
    """
    part, weights, labels = task.part(rows), task.weights[rows], task.labels[rows, None]
    values, slope = head.with_slope(hidden)
    values -= values.amax(-1, keepdim=True)
    # The logits that the objective needs are copied now, because the softmax and then the gradient overwrite them.
    label = values.gather(1, labels)
    kept, places = None, None
    if part is None:
        mass = rest = values.exp_().sum(-1, keepdim=True)
    else:
        # Unused places get the token id of their row's first entry, so that scatter_ below changes no other token.
        places = part.token_ids.where(part.used, part.token_ids[:, :1])
        kept = values.gather(1, places)
        # The tail is summed directly. 1 minus the mass of the entries would be pure rounding error for a small tail.
        rest = values.exp_().scatter_(1, places, 0.0).sum(-1, keepdim=True)
        mass = rest + kept.exp().where(part.used, 0.0).sum(-1, keepdim=True)
        kept = (kept - mass.log()).where(part.used, 0.0)
    label = (label - mass.log())[:, 0]
    tail = (rest / mass).clamp_min(TAIL_FLOOR).log()[:, 0]
    losses, grad_kept, grad_tail, grad_label = _losses_and_gradients(task, part, kept, tail, label, weights)

    # log q_k = z_k - log sum exp z has the derivative 1[v = k] - q_v with respect to z_v. For the tail T, log q_t =
    # The derivative of log sum_T exp z - log sum exp z is 1[v in T] q_v / q_t - q_v, also where q_t < TAIL_FLOOR.
    if part is None or kept is None or places is None or grad_kept is None:
        gradient = values.mul_(-grad_label / mass)
    else:
        grad_sum = grad_label + grad_tail + grad_kept.sum(-1, keepdim=True)
        gradient = values.mul_(grad_tail / rest.clamp_min(LEAST_MASS) - grad_sum / mass)
        grad_entries = grad_kept - grad_sum * kept.exp()
        # Unused places have the token id of their row's first entry, so they must write that entry's value.
        gradient.scatter_(1, places, grad_entries.where(part.used, grad_entries[:, :1]))
    gradient.scatter_add_(1, labels, grad_label)
    if slope is not None:
        gradient *= slope
    if task.split.scale != 1.0:
        gradient *= task.split.scale
    return (losses * weights).sum(), _losses(losses, -label, part, kept, tail), gradient


def _losses_and_gradients(
    task: _Task, part: Support | None, kept: Tensor | None, tail: Tensor, label: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Computes the objective [n] of a chunk, and the gradients of its weighted sum with respect to logprobs.

    Returns:
        The objective; the gradients with respect to `kept` [n, K] (None without a target), `tail` [n, 1] and
        `label` [n, 1].
    """
    grad_label = -(task.objective.label_weight * weights)[:, None]
    if task.objective.divergence is None or part is None or kept is None:
        return -label, None if kept is None else torch.zeros_like(kept), torch.zeros_like(grad_label), grad_label
    with torch.enable_grad():
        entries, others = kept.detach().requires_grad_(), tail.detach().requires_grad_()
        losses = task.losses(part, entries, others, label)
        grad_kept, grad_tail = torch.autograd.grad(losses, (entries, others), weights, allow_unused=True)
    grad_tail = torch.zeros_like(grad_label) if grad_tail is None else grad_tail[:, None]
    return losses.detach(), grad_kept, grad_tail, grad_label


def _add_product(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """Adds gradient.T @ hidden to `total`, the gradient [V, H] of the head's weight."""
    # addmm_ needs no temporary tensor [V, H], but all of its arguments must have the same dtype.
    if gradient.dtype == total.dtype:
        total.addmm_(gradient.T, hidden)
    else:
        total += gradient.T @ hidden


def _recomputed(hidden: Tensor, task: _Task) -> tuple[Tensor, list[RowLosses]]:
    """Computes the same as `_Fused`, for any head: the backward pass computes the logits of each chunk again."""

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
    """Returns the draft's logprobs of the entries, [n, K]; 0 beyond the entries of a row."""
    return logprobs.gather(1, part.token_ids).where(part.used, 0.0)


def _tail(logprobs: Tensor, part: Support) -> Tensor:
    """Returns the log of the draft's tail mass, [n], at least log TAIL_FLOOR. The gradient ignores this floor."""
    places = part.token_ids.where(part.used, part.token_ids[:, :1])
    mass = logprobs.exp().scatter(1, places, 0.0).sum(-1)
    tail = mass.clamp_min(LEAST_MASS).log()
    return tail + (tail.clamp_min(math.log(TAIL_FLOOR)) - tail).detach()


def _chunks(num_rows: int, size: int) -> Iterator[slice]:
    """Yields chunks that cover all rows. 0 rows give one empty chunk, so that every parameter still gets a gradient."""
    for start in range(0, max(1, num_rows), size):
        yield slice(start, start + size)


def _losses(
    objective: Tensor, label_nll: Tensor, part: Support | None, kept: Tensor | None, tail: Tensor | None
) -> RowLosses:
    """Returns the losses of rows. If there is a target, also computes the losses that need one: kl and alpha."""
    if part is None or kept is None or tail is None:
        return RowLosses(objective=objective, label_nll=label_nll, kl=None, alpha=None)
    kl = estimated_cross_entropy(part, kept, tail) - part.entropy()
    return RowLosses(objective=objective, label_nll=label_nll, kl=kl, alpha=acceptance_estimate(part, kept, tail))


def _joined(parts: list[RowLosses]) -> RowLosses:
    """Concatenates the losses of all chunks."""

    def join(name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    return RowLosses(**{name: join(name) for name in RowLosses.__slots__})  # type: ignore[arg-type]
