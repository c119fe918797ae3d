"""Dry run of a training: counts its documents and steps, and estimates the memory of a step from one micro-batch."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from trainer.data.sharding import Position, make_deal
from trainer.loss.fused_head import rows_at_once

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import TrainingArguments

    from trainer.data.dataset import DocumentDataset
    from trainer.drafts.source import DraftPlan
    from trainer.loss.draft_module import DraftModule

MIB = 2**20
STATES_PER_PARAMETER = {"adamw": 2, "adam": 2, "lion": 1, "sgd": 0, "rmsprop": 1, "adagrad": 1}
"""Number of states that an optimizer keeps per parameter, keyed by the start of the optimizer's name. A state is as
large as the parameter, or a quarter of that size in an 8-bit optimizer."""


def describe(
    dataset: DocumentDataset,
    module: DraftModule,
    plan: DraftPlan,
    training: TrainingArguments,
    *,
    ranks: int | None = None,
) -> str:
    """Runs one long micro-batch forward and backward, and returns a description of the run. No weights are updated.

    The micro-batch holds the longest packs of the first 8 steps.

    Args:
        dataset: The documents that would be read.
        module: The draft with its loss, on the CPU. It is moved to the run's device.
        plan: Plan from which the draft was made.
        training: Training arguments of transformers.
        ranks: Number of ranks that would train; None means the number of processes in this launch.

    Returns:
        Several lines of text: the numbers of documents, packs, steps and parameters; the share of padding; the memory
        of a step in MiB; and the notes of the plan.
    """
    order, deal = dataset.order, make_deal(training, dataset.order)
    deal = dataclasses.replace(deal, ranks=deal.ranks if ranks is None else ranks)
    steps = deal.num_steps(order.packs_per_epoch)
    total = training.max_steps
    if total <= 0:
        total = Position().num_steps(order.packs_per_epoch, deal, epochs=training.num_train_epochs)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    epoch = order.epoch(0)
    packs = [epoch[place] for place in range(min(len(epoch), deal.packs_per_step * 8))]
    # The longest packs need the most memory.
    longest = sorted(packs, key=lambda pack: -order.tokens(pack))[: deal.per_device_batch]
    batch = dataset.collator()([dataset[pack] for pack in longest])
    dataset.close()
    memory = _memory(module, batch, training)
    width = max(map(len, memory)) + 1
    padding = _padding([order.tokens(pack) for pack in packs], deal.per_device_batch)
    lines = [
        f"documents  {order.num_documents:,} to train on, {order.num_held_out:,} held out",
        f"packs      {order.packs_per_epoch:,} in an epoch, {'several documents' if order.packing else 'one document'} "
        f"each; {padding:.1%} of the first {len(packs):,} packs' batches are padding",
        f"steps      {total:,} of {deal.packs_per_step} packs ({deal.per_device_batch} x {deal.ranks} ranks x "
        f"{deal.accumulation} micro-batches); {steps:,} per epoch",
        f"draft      {plan.num_parameters:,} parameters, {trained:,} trained, vocabulary {plan.vocab_size:,}",
        f"micro-batch of the longest of {len(packs):,} packs: {batch['input_ids'].numel():,} tokens, "
        f"{len(batch['labels']):,} rows that count",
        *(f"  {name:<{width}}{size / MIB:>12,.1f} MiB" for name, size in memory.items()),
        f"  {'total, about':<{width}}{sum(memory.values()) / MIB:>12,.1f} MiB, plus memory of the framework itself",
        *plan.notes,
        "dry run: nothing was trained or written",
    ]
    return "\n".join(lines)


def _padding(tokens: list[int], batch: int) -> float:
    """Returns the share of padding, in [0, 1], among the tokens of batches that are padded to their longest pack.

    Args:
        tokens: Number of tokens of each pack.
        batch: Number of packs per batch.
    """
    batches = [tokens[start : start + batch] for start in range(0, len(tokens), batch)]
    return 1.0 - sum(tokens) / sum(len(packs) * max(packs) for packs in batches)


def _on(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Returns a micro-batch with all its tensors on a device."""
    return {name: _on(value, device) if isinstance(value, dict) else value.to(device) for name, value in batch.items()}


def _memory(module: DraftModule, batch: dict[str, Any], training: TrainingArguments) -> dict[str, float]:
    """Returns the bytes of memory that a step takes, by purpose."""
    module.to(training.device).train()
    # Tied weights share their address and are counted once.
    weights = {p.data_ptr(): p for p in module.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        # Several saved tensors may share a storage, which takes memory only once. Weights are counted separately.
        storage = tensor.untyped_storage()
        if tensor.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    mixed = torch.autocast(training.device.type, dtype=torch.bfloat16, enabled=training.bf16)
    with mixed, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = module(**_on(batch, training.device))["loss"]
    loss.backward()
    size = sum(p.numel() * p.element_size() for p in weights.values())
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    of_gradients = sum(grad.numel() * grad.element_size() for grad in gradients)
    name = str(getattr(training.optim, "value", training.optim))
    # An optimizer that is not in the table is assumed to keep two states, as AdamW does.
    states = next((number for kind, number in STATES_PER_PARAMETER.items() if name.startswith(kind)), 2)
    states_bytes = of_gradients * states * (0.25 if "8bit" in name else 1.0)
    head = module.draft.get_output_embeddings().weight
    rows = min(len(batch["labels"]), rows_at_once(module.split, head))
    # The float32 logits of one chunk of rows, plus the float32 buffer in which the head's gradient is summed.
    chunk = rows * module.split.vocab_size * 4 + head.numel() * 4
    module.zero_grad(set_to_none=True)
    return {
        "weights": size,
        "gradients": of_gradients,
        f"optimizer ({name})": states_bytes,
        "activations, measured": sum(saved.values()),
        "a chunk of the head": chunk,
    }
