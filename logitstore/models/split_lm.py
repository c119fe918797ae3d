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
"""Logits of one chunk of rows: 8 MiB in float32, which a CPU's cache nearly holds; 256 MiB keep a GPU busy."""
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""What configurations call the soft cap of logits: Gemma's, RecurrentGemma's, xLSTM's name."""


class SplitLM:
    """A causal LM in two halves, so that the head runs on chosen rows alone.

    Attributes:
        model: The whole model.
        vocab_size: The true vocabulary V; logits beyond it, of padding rows of the embedding, never come out.
        scale: What the head's output is multiplied by.
        softcap: Then logits are softcap * tanh(logits / softcap), unless it is None.
    """

    def __init__(self, model: PreTrainedModel, vocab_size: int) -> None:
        self.model = model
        self.vocab_size = vocab_size
        config = model.config.get_text_config()
        self.scale = _logit_scale(config)
        self.softcap = next((cap for name in SOFTCAPS if (cap := getattr(config, name, None))), None)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    @property
    def rows_per_chunk(self) -> int:
        """Rows whose logits are made at once; a matrix product of fewer than 64 wastes its reading of the head."""
        return max(64, LOGITS_PER_CHUNK.get(self.device.type, 2**26) // self.vocab_size)

    @property
    def backbone(self) -> torch.nn.Module:
        """All but the head."""
        base: torch.nn.Module = self.model.base_model
        # the text half of a larger model: transformers looks for it under the name that the larger one has it under
        return getattr(base, "model", base) if base is self.model else base

    @property
    def head(self) -> torch.nn.Linear:
        """The output embedding."""
        head: torch.nn.Linear = self.model.get_output_embeddings()
        return head

    def hidden(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Runs the backbone.

        Args:
            input_ids: Int64 [B, T], right-padded. No mask is needed: attention is causal, so that nothing after a
                token reaches it.
            position_ids: Int64 [B, T], from 0 at each document of a row that holds several: none attends to another
                then. Only for models that pass `check_packing`.

        Returns:
            [B, T, H], after the last norm, in the head's dtype: some state-space models compute in float32 till then.
        """
        shape = input_ids.shape
        if position_ids is None:
            output = self.backbone(input_ids=input_ids, use_cache=False)
        else:
            if is_flash_attention_requested(self.model.config.get_text_config()):
                # it sees where documents begin in a batch of one row alone
                input_ids, position_ids = input_ids.reshape(1, -1), position_ids.reshape(1, -1)
            output = self.backbone(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        hidden: Tensor = output.last_hidden_state
        return hidden.reshape(*shape, -1).to(self.head.weight.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """Runs the head.

        Args:
            hidden: [N, H].

        Returns:
            Float32 [N, V].
        """
        logits: Tensor = self.head(hidden)[:, : self.vocab_size].float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


def _logit_scale(config: PreTrainedConfig) -> float:
    """What a model multiplies its head's output by; a power of the width, in maximal update parametrisation."""
    factors = ["logit_scale", "lm_head_multiplier"]
    divisors = ["logits_scaling", "logits_mup_width_multiplier"]
    if config.model_type == "hyperclovax":  # the same name as Granite's, used the other way round
        factors, divisors = [*factors, "logits_scaling"], ["logits_mup_width_multiplier"]
    scale = math.prod(getattr(config, name, None) or 1.0 for name in factors)
    return scale / math.prod(getattr(config, name, None) or 1.0 for name in divisors)
