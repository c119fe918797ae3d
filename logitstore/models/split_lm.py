"""A causal language model split into its backbone and its head."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from transformers.utils.generic import is_flash_attention_requested

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel


LOGITS_PER_CHUNK = {"cpu": 2**21, "cuda": 2**26}
"""Number of logits computed at once, by device type. In float32 these are 8 MiB on a CPU (about the size of its
cache) and 256 MiB on a GPU (enough to keep it busy)."""
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Names that the configurations of Gemma, RecurrentGemma and xLSTM use for the soft cap of the logits."""


class SplitLM:
    """A causal LM split into backbone and head, so that the head runs only on the rows that are needed.

    B: batch size, T: tokens in a batch row, N: rows, H: hidden size, V: vocabulary size.

    Attributes:
        model: The whole model.
        vocab_size: Size V of the tokenizer's vocabulary. The logits of ids from V on come from padding rows of the
            output embedding and are dropped.
        scale: Factor that the head's output is multiplied by; 1 for most architectures.
        softcap: Soft cap c of the logits, applied after the scale as c * tanh(logits / c); None for no soft cap.
    """

    def __init__(self, model: PreTrainedModel, vocab_size: int) -> None:
        self.model = model
        self.vocab_size = vocab_size
        config = model.config.get_text_config()
        self.scale = _logit_scale(config)
        self.softcap = next((cap for name in SOFTCAPS if (cap := getattr(config, name, None))), None)

    @property
    def device(self) -> torch.device:
        """Device of the model's parameters."""
        return self.model.device

    @property
    def rows_per_chunk(self) -> int:
        """Number of rows whose logits are computed at once.

        At least 64: each matrix product reads all weights of the head, so chunks of only a few rows would be slow.
        """
        return max(64, LOGITS_PER_CHUNK.get(self.device.type, 2**26) // self.vocab_size)

    @property
    def backbone(self) -> torch.nn.Module:
        """The model without its head."""
        base: torch.nn.Module = self.model.base_model
        # For the text half of a larger model, `base_model` returns the model itself, because transformers looks for an
        # attribute that only the larger model has. The backbone is then the attribute `model`.
        return getattr(base, "model", base) if base is self.model else base

    @property
    def head(self) -> torch.nn.Linear:
        """The output embedding."""
        head: torch.nn.Linear = self.model.get_output_embeddings()
        return head

    def hidden(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Runs the backbone.

        Args:
            input_ids: Int64 [B, T], right-padded. No attention mask is needed: attention is causal, so no hidden
                state depends on padding after it.
            position_ids: Int64 [B, T], only for packed documents, and only for models that pass `check_packing`. The
                positions begin at 0 in each document, and documents do not attend to one another. If None, each
                batch row is a single document, and its tokens are numbered from 0.

        Returns:
            [B, T, H]: hidden states after the last norm, in the dtype of the head. They are converted to this dtype,
            because the backbones of some state-space models return float32.
        """
        shape = input_ids.shape
        if position_ids is None:
            output = self.backbone(input_ids=input_ids, use_cache=False)
        else:
            if is_flash_attention_requested(self.model.config.get_text_config()):
                # Flash attention derives the documents from `position_ids` only if the batch has a single row.
                input_ids, position_ids = input_ids.reshape(1, -1), position_ids.reshape(1, -1)
            output = self.backbone(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        hidden: Tensor = output.last_hidden_state
        return hidden.reshape(*shape, -1).to(self.head.weight.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """Runs the head.

        Args:
            hidden: [N, H]: hidden states from `hidden`.

        Returns:
            Float32 [N, V]: logits of the true vocabulary, after the scale and the soft cap.
        """
        logits: Tensor = self.head(hidden)[:, : self.vocab_size].float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


def _logit_scale(config: PreTrainedConfig) -> float:
    """Returns the factor by which a model multiplies its head's output.

    Models with maximal update parametrisation (muP) have such a factor; it is a power of the model's width. The name of
    the factor in the configuration depends on the architecture.
    """
    factors = ["logit_scale", "lm_head_multiplier"]
    divisors = ["logits_scaling", "logits_mup_width_multiplier"]
    if config.model_type == "hyperclovax":  # Granite divides by `logits_scaling`; HyperCLOVA X multiplies by it.
        factors, divisors = [*factors, "logits_scaling"], ["logits_mup_width_multiplier"]
    scale = math.prod(getattr(config, name, None) or 1.0 for name in factors)
    return scale / math.prod(getattr(config, name, None) or 1.0 for name in divisors)
