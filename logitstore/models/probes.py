"""Whether a causal LM can be taken apart, and whether it keeps the documents of a packed row apart: tried, not assumed.

Each check runs the model on a few tokens and raises ValueError with the model, its class and what was found. Here is
what a list of architectures would be for; code that comes with a model is checked like transformers' own.
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
"""What the probe's logits are enlarged to: a soft cap, of 30 say, does not show on a fresh model's small ones."""
TOKENS = 8
"""Tokens of a probe."""


@torch.no_grad()
def check_halves(lm: SplitLM) -> None:
    """Compares backbone and head with the model as a whole, and looks whether later tokens reach earlier ones.

    Raises:
        ValueError: The model does something else between its backbone and its logits, or is not causal.
    """
    ids = torch.arange(TOKENS, device=lm.device)[None] % lm.vocab_size
    head = lm.head
    if head is None or getattr(head, "weight", None) is None:
        raise _refusal(lm, "have logits that are its output embedding applied to its backbone", "has no such embedding")
    with _evaluating(lm):
        output = lm.backbone(input_ids=ids, use_cache=False)
        states: Tensor | None = getattr(output, "last_hidden_state", None)
        if states is None or states.shape != (1, TOKENS, head.weight.shape[-1]):
            raise _refusal(
                lm, "have logits that are its output embedding applied to its backbone", "has something between them"
            )
        hidden = states.to(head.weight.dtype)
        raw = float(head(hidden[0]).float().abs().max().nan_to_num())
        for factor in (1.0, LARGE_LOGIT / raw if raw > 0 else 1.0):
            _compare(lm, head, ids, hidden[0], factor)
        before = TOKENS // 2
        ids[0, before:] = (ids[0, before:] + 1) % lm.vocab_size
        changed = _difference(hidden[:, :before], lm.hidden(ids)[:, :before])
    # Experts work on groups of tokens, whose sizes change with the tokens: not all of a difference is knowledge.
    if changed > max(1e-4, 8 * torch.finfo(hidden.dtype).eps):
        raise _refusal(
            lm, "be causal", f"changes its states by a fraction of {changed:.1g} where later tokens are others"
        )


def _compare(lm: SplitLM, head: nn.Module, ids: Tensor, hidden: Tensor, factor: float) -> None:
    """Raises ValueError if the model makes other logits than its halves where the head is given `factor` times more."""
    hook = head.register_forward_pre_hook(lambda _module, inputs: (inputs[0] * factor, *inputs[1:]))
    try:
        whole: Tensor = lm.model(input_ids=ids, use_cache=False).logits
    finally:
        hook.remove()
    if whole.ndim != 3 or whole.shape[:2] != ids.shape or whole.shape[2] < lm.vocab_size:
        raise _refusal(
            lm, f"give a logit of each of the {lm.vocab_size} tokens", f"gives logits of shape {list(whole.shape)}"
        )
    whole = whole[0, :, : lm.vocab_size].float()
    halves = lm.logits(hidden * factor)
    # bf16 matrix products of other shapes differ in the last bits. NaN is not this check's business.
    size = float(whole.nan_to_num().abs().max())
    if not torch.allclose(whole, halves, rtol=2e-2, atol=2e-2 * size, equal_nan=True):
        raise ValueError(
            f"model must have logits that are its output embedding applied to its backbone, got {_name(lm)}, whose "
            f"logits differ by up to {float((whole - halves).abs().max()):.3g}; this architecture is not supported"
        )


@torch.no_grad()
def check_packing(lm: SplitLM) -> None:
    """Compares documents that are packed with others into one row with the same ones elsewhere.

    Says nothing of an implementation of attention that runs on another kind of device than the model is on.

    Raises:
        ValueError: What a document gives depends on what it is packed with, or on where.
    """
    must = "keep the documents of a packed row apart"
    config = lm.model.config.get_text_config()
    if "position_ids" not in inspect.signature(lm.backbone.forward).parameters:
        raise _packing_refusal(lm, must, "takes no position_ids")
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        # thousands of tokens long: no probe reaches where they end
        raise _packing_refusal(lm, must, "attends within chunks of the row, wherever documents begin")

    generator = torch.Generator().manual_seed(0)
    drawn, beside = torch.randint(lm.vocab_size, (2, 5 + 7 + 6), generator=generator).to(lm.device)
    first, middle, last = drawn.split([5, 7, 6])
    other_first, other_last = (first + 1) % lm.vocab_size, (last + 1) % lm.vocab_size

    def packed(*documents: Tensor, start: int) -> Tensor:
        positions = torch.cat([torch.arange(len(one)) for one in documents])
        # and a second row, with its documents elsewhere
        ids = torch.stack([torch.cat(documents), beside])
        rows = torch.stack([positions, torch.arange(len(beside)) % 9]).to(lm.device)
        return lm.hidden(ids, rows)[0, start : start + len(middle)]

    with _evaluating(lm):
        plain = packed(first, middle, last, start=5)
        # A causal model cannot know of a later document: what that one changes is arithmetic alone.
        arithmetic = _difference(plain, packed(first, middle, other_last, start=5))
        leak = _difference(plain, packed(other_first, middle, last, start=5))
        moved = _difference(plain, packed(middle, first, last, start=0))
    if leak > 8 * arithmetic + 1e-5:
        raise _packing_refusal(lm, must, f"changes its states by a fraction of {leak:.1g} with the document before")
    if moved > max(1e-3, 16 * torch.finfo(plain.dtype).eps):
        raise _packing_refusal(lm, must, f"changes its states by a fraction of {moved:.1g} with the place in the row")


@contextmanager
def _evaluating(lm: SplitLM) -> Iterator[None]:
    """Turns dropout off for a while, and on a CPU an attention that only GPUs have."""
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
    """The largest difference as a fraction of the largest number; 0 where there are no finite ones."""
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
