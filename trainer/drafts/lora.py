"""LoRA (arXiv 2106.09685) through peft: low-rank updates of a draft's linear layers, merged into it at the end."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from packaging.version import Version
from safetensors.torch import load_file
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"
"""The targets that are all linear layers but the head, by peft's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """How a draft is adapted."""

    rank: int
    """Of the updates."""
    alpha: float
    """Updates are scaled by alpha / rank."""
    dropout: float
    """Fraction of an update's inputs that is dropped in training."""
    targets: tuple[str, ...] = (ALL_LINEAR,)
    """Ends of the names of the linear layers that are adapted, or "all-linear"."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora_rank must be at least 1, got lora_rank={self.rank}; 16 is usual")
        if not self.alpha > 0:
            raise ValueError(f"lora_alpha must be above 0, got lora_alpha={self.alpha}; twice the rank is usual")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora_dropout must be at least 0 and below 1, got lora_dropout={self.dropout}; give 0")
        if not self.targets:
            raise ValueError(f"lora_targets must be some layers, got none; give {ALL_LINEAR}")
        if find_spec("peft") is None:
            raise ValueError(
                f"lora_rank must be left out where peft is not installed, got lora_rank={self.rank}; "
                "pip install 'logitstore[train]'"
            )
        if Version(version("peft")) < Version(MIN_PEFT_VERSION):
            raise ValueError(
                f"lora_rank must be left out with these packages, got lora_rank={self.rank} with peft "
                f"{version('peft')}, and transformers {version('transformers')} needs peft >= {MIN_PEFT_VERSION}; "
                "install a newer peft, or an older transformers"
            )


def add_lora(draft: PreTrainedModel, lora: Lora, seed: int) -> None:
    """Adapts a draft in place: the updates alone have gradients from now on, and the draft says the same as before.

    The draft stays a transformers model: its `save_pretrained` writes the adapter alone, for checkpoints.

    Args:
        draft: A causal LM.
        lora: How.
        seed: Of the updates' first weights.

    Raises:
        ValueError: It has no such layers, or the head is among them.
    """
    from peft import LoraConfig

    linear = [name for name, part in draft.named_modules() if isinstance(part, (torch.nn.Linear, Conv1D))]
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # declared a whole number, and used as any
        lora_dropout=lora.dropout,
        target_modules=ALL_LINEAR if lora.targets == (ALL_LINEAR,) else list(lora.targets),
        fan_in_fan_out=any(isinstance(part, Conv1D) for part in draft.modules()),
        task_type="CAUSAL_LM",
    )
    given = f"got lora_targets={' '.join(lora.targets)}"
    if lora.targets != (ALL_LINEAR,):
        for target in lora.targets:
            if not any(name == target or name.endswith(f".{target}") for name in linear):
                ends = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
                raise ValueError(f"lora_targets must be linear layers of the draft, {given}; there are {ends}")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # of GPT-2's layers and others in one model, whose weights lie the other way round: each is stored right
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        torch.manual_seed(seed)
        draft.add_adapter(config)
    head = draft.get_output_embeddings()
    if hasattr(head, "base_layer"):
        raise ValueError(
            f"lora_targets must leave out the head, whose gradient is computed apart, {given}; give {ALL_LINEAR}"
        )


def has_lora(draft: PreTrainedModel) -> bool:
    """Whether a draft is adapted."""
    return bool(getattr(draft, "_hf_peft_config_loaded", False))


def load_lora(draft: PreTrainedModel, folder: str | Path) -> None:
    """Loads into an adapted draft the updates that its `save_pretrained` wrote to a checkpoint."""
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(draft, load_file(Path(folder) / "adapter_model.safetensors"))


@torch.no_grad()
def merge_lora(draft: PreTrainedModel) -> None:
    """Adds the updates to the weights, in place: an ordinary model again, which saves as one."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in list(draft.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            parent, _, attribute = name.rpartition(".")
            setattr(draft.get_submodule(parent), attribute, layer.get_base_layer())
    draft._hf_peft_config_loaded = False
    del draft.peft_config
    draft.requires_grad_(True)
