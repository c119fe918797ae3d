"""Checks that a causal LM can be split into backbone and head, and that it can run on packed documents.

Each check runs the model on a few tokens. If the model fails, the check raises ValueError, whose message names the
model, its class and the problem. The checks replace a list of supported architectures, so they also cover code that
comes with a model (trust_remote_code).
"""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from transformers.utils.generic import is_flash_attention_requested

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from logitstore.models.split_lm import SplitLM

LARGE_LOGIT = 100.0
"""Largest absolute logit in the second pass of `check_halves`. A soft cap (of 30, for example) hardly changes the small
logits of an untrained model, but it changes logits of this size."""
TOKENS = 8
"""Number of tokens in the input of `check_halves`."""


@torch.no_grad()
def check_halves(lm: SplitLM) -> None:
    """Checks that backbone and head together compute the model's logits, and that the model is causal.

    Runs the whole model and its two halves on 8 tokens and compares their logits. A second pass compares the logits
    after they were scaled up to `LARGE_LOGIT`. Then the last four tokens are changed: the hidden states of the first
    four tokens must stay the same.

    Args:
        lm: The model, on the device where it will run. Its training mode is restored afterwards.

    Raises:
        ValueError: The model's logits are not its head applied to the last hidden states of its backbone, or hidden
            states depend on later tokens.
    """
    # The modulo keeps the ids valid for a vocabulary with fewer than 8 tokens.
    ids = torch.arange(TOKENS, device=lm.device)[None] % lm.vocab_size
    head = lm.head
    if head is None or getattr(head, "weight", None) is None:
        raise _refusal(lm, "have an output embedding that turns its last hidden states into logits", "has none")
    with _evaluating(lm):
        output = lm.backbone(input_ids=ids, use_cache=False)
        states: Tensor | None = getattr(output, "last_hidden_state", None)
        if states is None or states.shape != (1, TOKENS, head.weight.shape[-1]):
            raise _refusal(
                lm,
                "have an output embedding that turns its last hidden states into logits",
                "has another step between the two",
            )
        hidden = states.to(head.weight.dtype)
        raw = float(head(hidden[0]).float().abs().max().nan_to_num())
        for factor in (1.0, LARGE_LOGIT / raw if raw > 0 else 1.0):
            _compare(lm, head, ids, hidden[0], factor)
        before = TOKENS // 2
        ids[0, before:] = (ids[0, before:] + 1) % lm.vocab_size
        changed = _difference(hidden[:, :before], lm.hidden(ids)[:, :before])
    # In a mixture of experts, the number of tokens that an expert gets depends on the later tokens too, and rounding
    # depends on that number. The tolerance therefore allows small differences.
    if changed > max(1e-4, 8 * torch.finfo(hidden.dtype).eps):
        raise _refusal(
            lm, "be causal", f"changes the states of earlier tokens by {100 * changed:.1g} % when later tokens change"
        )


def _compare(lm: SplitLM, head: nn.Module, ids: Tensor, hidden: Tensor, factor: float) -> None:
    """Compares the logits of the whole model with those of its halves.

    The input of the head is multiplied by `factor` in the whole model and in the halves. This changes the size of the
    logits. T: number of tokens. H: hidden size.

    Args:
        lm: The model.
        head: The head of the model.
        ids: Int64 [1, T]: input of the model.
        hidden: [T, H]: hidden states that the backbone computes from `ids`.
        factor: Factor that the input of the head is multiplied by.

    Raises:
        ValueError: The logits differ by more than rounding.
    """
    hook = head.register_forward_pre_hook(lambda _module, inputs: (inputs[0] * factor, *inputs[1:]))
    try:
        whole: Tensor = lm.model(input_ids=ids, use_cache=False).logits
    finally:
        hook.remove()
    if whole.ndim != 3 or whole.shape[:2] != ids.shape or whole.shape[2] < lm.vocab_size:
        raise _refusal(
            lm, f"give a logit for each of the {lm.vocab_size} tokens", f"gives logits of shape {list(whole.shape)}"
        )
    whole = whole[0, :, : lm.vocab_size].float()
    halves = lm.logits(hidden * factor)
    # The two matrix products have different shapes, so their bf16 results differ in the last bits. A place where
    # both logits are NaN is accepted, because NaN does not show whether the model can be split.
    size = float(whole.nan_to_num().abs().max())
    if not torch.allclose(whole, halves, rtol=2e-2, atol=2e-2 * size, equal_nan=True):
        raise ValueError(
            f"model must compute its logits from its last hidden states and its output embedding alone, got {_name(lm)}"
            f", whose logits differ by up to {float((whole - halves).abs().max()):.3g} from logits computed so; "
            "this architecture is not supported"
        )


@torch.no_grad()
def check_packing(lm: SplitLM) -> None:
    """Checks that the hidden states of a document do not depend on the documents packed into the same batch row.

    Runs three documents packed into one batch row. Then changes the neighbours of the middle document, or its place in
    the batch row. The hidden states of the middle document must stay the same. The result holds only for the attention
    implementation that runs on the model's current device: flash attention cannot be checked on a CPU.

    Args:
        lm: The model, on the device where it will run. Its training mode is restored afterwards.

    Raises:
        ValueError: The hidden states of a document depend on the other documents in the batch row, or on the place of
            the document in the batch row.
    """
    must = "keep the documents of a packed row apart"
    config = lm.model.config.get_text_config()
    if "position_ids" not in inspect.signature(lm.backbone.forward).parameters:
        raise _packing_refusal(lm, must, "takes no position_ids")
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        # A chunk has thousands of tokens. The short input below ends before the first chunk does, so the comparison
        # would not notice that documents attend to one another.
        raise _packing_refusal(lm, must, "attends within fixed chunks of the row, which ignore where documents begin")

    generator = torch.Generator().manual_seed(0)
    drawn, beside = torch.randint(lm.vocab_size, (2, 5 + 7 + 6), generator=generator).to(lm.device)
    first, middle, last = drawn.split([5, 7, 6])
    other_first, other_last = (first + 1) % lm.vocab_size, (last + 1) % lm.vocab_size

    def packed(*documents: Tensor, start: int) -> Tensor:
        positions = torch.cat([torch.arange(len(one)) for one in documents])
        # The documents of the second row begin at other places. If the model took the boundaries of the first row from
        # the second one, the middle document would attend to the one before it, and `leak` would be large.
        ids = torch.stack([torch.cat(documents), beside])
        rows = torch.stack([positions, torch.arange(len(beside)) % 9]).to(lm.device)
        return lm.hidden(ids, rows)[0, start : start + len(middle)]

    with _evaluating(lm):
        plain = packed(first, middle, last, start=5)
        # In a causal model, a later document can change the states of an earlier one only by rounding, which
        # `arithmetic` measures. `leak` measures the effect of an earlier document. It must not be clearly larger than
        # `arithmetic`.
        arithmetic = _difference(plain, packed(first, middle, other_last, start=5))
        leak = _difference(plain, packed(other_first, middle, last, start=5))
        moved = _difference(plain, packed(middle, first, last, start=0))
    if leak > 8 * arithmetic + 1e-5:
        raise _packing_refusal(
            lm, must, f"changes a document's states by {100 * leak:.1g} % when the document before it changes"
        )
    if moved > max(1e-3, 16 * torch.finfo(plain.dtype).eps):
        raise _packing_refusal(
            lm, must, f"changes a document's states by {100 * moved:.1g} % when its place in the row changes"
        )


@contextmanager
def _evaluating(lm: SplitLM) -> Iterator[None]:
    """Context manager that turns off dropout. On a CPU, uses sdpa instead of flash attention, which only GPUs have."""
    model, training = lm.model, lm.model.training
    absent = lm.device.type == "cpu" and is_flash_attention_requested(model.config)
    wanted = model.config._attn_implementation
    model.eval()
    if absent:
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if absent:
            model.set_attn_implementation(wanted)
        model.train(training)


def _difference(one: Tensor, other: Tensor) -> float:
    """Returns the largest absolute difference of two tensors, as a fraction of the largest absolute value of `one`.

    NaN counts as 0. Returns 0 if all values of `one` are 0.
    """
    size = float(one.float().nan_to_num().abs().max())
    return float((one.float() - other.float()).nan_to_num().abs().max()) / size if size else 0.0


def _name(lm: SplitLM) -> str:
    return f"model={lm.model.name_or_path or lm.model.config.model_type} ({type(lm.model).__name__})"


def _refusal(lm: SplitLM, must: str, found: str) -> ValueError:
    return ValueError(f"model must {must}, got {_name(lm)}, which {found}; this architecture is not supported")


def _packing_refusal(lm: SplitLM, must: str, found: str) -> ValueError:
    attention = lm.model.config._attn_implementation
    return ValueError(
        f"model must {must}, got {_name(lm)} with attn_implementation={attention}, which {found}; train it without "
        "packing, or give another --attn_implementation"
    )
