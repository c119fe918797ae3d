"""The LM head and the objective, fused in chunks of rows: neither logits nor their gradient exist whole.

The gradient of a chunk is computed in its forward pass, while its logits are there: an objective sees the kept entries
alone, so that the gradient by the logits is a few numbers a row and a multiple of the softmax. Heads that are no plain
linear layer (LoRA on the head, say) compute each chunk's logits again in the backward pass instead.

N rows, M of them trained on, K entries per row at most, V vocabulary, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from logitstore.support import Support, acceptance_estimate, log_tail, on_support, soft_cross_entropy

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from logitstore.causal_lm import SplitLM
    from trainer.objectives import Objective


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
    task = _Task(split=split, support=support, labels=labels, weights=weights, objective=objective)
    head = split.model.get_output_embeddings()
    if type(head) is nn.Linear:
        parts: list[RowLosses] = []
        total: Tensor = _Fused.apply(hidden, head.weight, head.bias, task, parts)  # type: ignore[no-untyped-call]
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
        wanted: Names of `trainer.selection.LOOKS`.

    Returns:
        [N] by name; and the losses of the rows, whose `objective` is the label's.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in wanted}
    parts = []
    for rows in _chunks(len(hidden), split.rows_per_chunk):
        logits = split.logits(hidden[rows])
        part = None if support is None else support[rows]
        log_sum = logits.logsumexp(-1, keepdim=True)
        label = (logits.gather(1, labels[rows, None]) - log_sum)[:, 0]
        kept = None if part is None else (logits.gather(1, part.token_ids) - log_sum).where(part.used, 0.0)
        if kept is not None and part is not None and "draft_ce" in found:
            found["draft_ce"].append(soft_cross_entropy(part, kept, log_tail(kept, part)))
        if "draft_label_nll" in found:
            found["draft_label_nll"].append(-label)
        if "draft_likeliest" in found:
            found["draft_likeliest"].append(logits.argmax(-1))
        if "draft_entropy" in found:
            logprobs = logits.sub_(log_sum)
            found["draft_entropy"].append(-torch.linalg.vecdot(logprobs.exp(), logprobs))
        parts.append(_losses(-label, -label, part, kept))
    return {name: torch.cat(values) for name, values in found.items()}, _joined(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """What is to be done with M rows."""

    split: SplitLM
    support: Support | None
    labels: Tensor
    weights: Tensor
    objective: Objective

    def chunks(self) -> Iterator[slice]:
        return _chunks(len(self.labels), self.split.rows_per_chunk)

    def part(self, rows: slice) -> Support | None:
        return None if self.support is None else self.support[rows]

    def losses(self, part: Support | None, kept: Tensor | None, label: Tensor) -> Tensor:
        """Returns what is minimised at some rows, [n], from logprobs at their entries [n, K] and labels [n]."""
        share, divergence = self.objective.label_weight, self.objective.divergence
        if divergence is None or part is None or kept is None:
            return -label
        losses = divergence(part, kept, log_tail(kept, part))
        return losses if share == 0.0 else (1.0 - share) * losses - share * label


class _Fused(torch.autograd.Function):
    """hidden [M, H], a linear head -> the weighted sum of M losses. Appends their parts to a list."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        task: _Task,
        parts: list[RowLosses],
    ) -> Tensor:
        device, split = hidden.device.type, task.split
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        # of many chunks a sum in bfloat16 would lose what each adds
        of_weight = torch.zeros(weight.shape, device=weight.device) if ctx.needs_input_grad[1] else None
        of_bias = None if bias is None else torch.zeros(bias.shape, device=bias.device)
        of_hidden = torch.empty_like(hidden)
        total = torch.zeros((), device=hidden.device)
        with torch.autocast(device, enabled=False):
            head, rows_in = weight[: split.vocab_size].to(dtype), hidden.to(dtype)
            offset = None if bias is None else bias[: split.vocab_size].float()
            room = rows_in.new_empty(min(len(hidden), split.rows_per_chunk), split.vocab_size)
            for rows in task.chunks():
                product = torch.mm(rows_in[rows], head.T, out=room[: len(hidden[rows])])
                losses, part, of_product = _chunk(product, offset, task, rows)
                total += losses
                parts.append(part)
                of_product = of_product.to(dtype)
                of_hidden[rows] = of_product @ head
                if of_weight is not None:
                    _add_product(of_weight[: split.vocab_size], of_product, rows_in[rows])
                if of_bias is not None:
                    of_bias[: split.vocab_size] += of_product.sum(0, dtype=torch.float32)
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
        return (*scaled, None, None)


def _chunk(product: Tensor, offset: Tensor | None, task: _Task, rows: slice) -> tuple[Tensor, RowLosses, Tensor]:
    """Computes the losses of n rows and their gradient, in the memory of the logits where that is float32.

    Args:
        product: [n, V], what the linear layer says without its bias.
        offset: The bias, float32 [V], or None.
        task: Of which this is a part.
        rows: Which.

    Returns:
        The weighted sum of the losses, the losses, and the gradient of the sum by `product`, float32 [n, V].
    """
    part, weights, labels = task.part(rows), task.weights[rows], task.labels[rows, None]
    split = task.split
    values = product.float()
    if offset is not None:
        values += offset
    if split.scale != 1.0:
        values *= split.scale
    slope = None
    if split.softcap is not None:
        values.div_(split.softcap).tanh_()
        slope = 1.0 - values.square()
        values *= split.softcap
    values -= values.amax(-1, keepdim=True)
    # what the objective needs of the logits, before their memory becomes the softmax's
    kept = None if part is None else values.gather(1, part.token_ids)
    label = values.gather(1, labels)
    mass = values.exp_().sum(-1, keepdim=True)
    log_mass = mass.log()
    label = (label - log_mass)[:, 0]
    kept = None if part is None or kept is None else (kept - log_mass).where(part.used, 0.0)
    losses, of_kept, of_label = _by_entries(task, part, kept, label, weights)

    # logprob_k = z_k - log sum exp z: by z_v it is 1[k = v] - q_v
    of_all = of_label if of_kept is None else of_label + of_kept.sum(-1, keepdim=True)
    gradient = values.mul_(-of_all / mass).scatter_add_(1, labels, of_label)
    if part is not None and of_kept is not None:
        gradient.scatter_add_(1, part.token_ids, of_kept)
    if slope is not None:
        gradient *= slope
    if split.scale != 1.0:
        gradient *= split.scale
    return (losses * weights).sum(), _losses(losses, -label, part, kept), gradient


def _by_entries(
    task: _Task, part: Support | None, kept: Tensor | None, label: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Returns losses [n] and the gradients of their weighted sum: by entries [n, K], None without, by labels [n, 1]."""
    of_label = -(task.objective.label_weight * weights)[:, None]
    if task.objective.divergence is None or kept is None:
        return -label, None, of_label
    with torch.enable_grad():
        leaf = kept.detach().requires_grad_()
        losses = task.losses(part, leaf, label)
        (of_kept,) = torch.autograd.grad(losses, leaf, weights)
    return losses.detach(), of_kept, of_label


def _add_product(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """Adds gradient.T @ hidden to the head's gradient, [V, H]."""
    if gradient.dtype == total.dtype:
        total.addmm_(gradient.T, hidden)
    else:
        total += gradient.T @ hidden


def _again(hidden: Tensor, task: _Task) -> tuple[Tensor, list[RowLosses]]:
    """Does as `_Fused` for any head: the logits of a chunk are computed again in the backward pass."""

    def losses(hidden: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        logprobs = task.split.logits(hidden).log_softmax(-1)
        part, label = task.part(rows), logprobs.gather(1, task.labels[rows, None])[:, 0]
        kept = None if part is None else on_support(logprobs, part)[0]
        return task.losses(part, kept, label), label.detach(), None if kept is None else kept.detach()

    total, parts = torch.zeros((), device=hidden.device), []
    for rows in task.chunks():
        found, label, kept = checkpoint(losses, hidden[rows], rows, use_reentrant=False, preserve_rng_state=False)
        total = total + (found * task.weights[rows]).sum()
        parts.append(_losses(found.detach(), -label, task.part(rows), kept))
    return total, parts


def _chunks(num_rows: int, size: int) -> Iterator[slice]:
    """Yields at least one chunk: what is computed of no rows hangs on every parameter too."""
    for start in range(0, max(1, num_rows), size):
        yield slice(start, start + size)


def _losses(objective: Tensor, label_nll: Tensor, part: Support | None, kept: Tensor | None) -> RowLosses:
    if part is None or kept is None:
        return RowLosses(objective=objective, label_nll=label_nll, kl=None, alpha=None)
    tail = log_tail(kept, part)
    kl = soft_cross_entropy(part, kept, tail) - part.entropy()
    return RowLosses(objective=objective, label_nll=label_nll, kl=kl, alpha=acceptance_estimate(part, kept, tail))


def _joined(parts: list[RowLosses]) -> RowLosses:
    def join(name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    return RowLosses(**{name: join(name) for name in RowLosses.__slots__})  # type: ignore[arg-type]
