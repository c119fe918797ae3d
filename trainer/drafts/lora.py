"""LoRA (arXiv 2106.09685) through peft: adds low-rank updates to a draft's linear layers, and merges them later."""

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
"""Value of peft's `target_modules` that stands for all linear layers except the head."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """Options of LoRA. The constructor raises ValueError if a value is out of its range, or if peft cannot be used."""

    rank: int
    """Rank of the updates, at least 1."""
    alpha: float
    """Scale of the updates, above 0: an update is multiplied by alpha / rank."""
    dropout: float
    """Fraction of an update's inputs that is dropped in training, at least 0 and below 1."""
    targets: tuple[str, ...] = (ALL_LINEAR,)
    """Names of the linear layers to adapt, or the last parts of their names, such as "q_proj". The single name
    "all-linear" stands for all linear layers except the head."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora_rank must be at least 1, got lora_rank={self.rank}; 16 is usual")
        if not self.alpha > 0:
            raise ValueError(f"lora_alpha must be above 0, got lora_alpha={self.alpha}; twice the rank is usual")
        if not 0 <= self.dropout < 1:
            raise ValueError(
                f"lora_dropout must be at least 0 and below 1, got lora_dropout={self.dropout}; 0 is usual"
            )
        if not self.targets:
            raise ValueError(f"lora_targets must name at least one layer, got none; give {ALL_LINEAR}")
        if find_spec("peft") is None:
            raise ValueError(
                f"lora_rank needs the package peft, got lora_rank={self.rank} without it; run "
                "pip install 'logitstore[train]'"
            )
        if Version(version("peft")) < Version(MIN_PEFT_VERSION):
            raise ValueError(
                f"lora_rank needs peft >= {MIN_PEFT_VERSION} with transformers {version('transformers')}, got "
                f"lora_rank={self.rank} with peft {version('peft')}; install a newer peft, or an older transformers"
            )


def add_lora(draft: PreTrainedModel, lora: Lora, seed: int) -> None:
    """Adds LoRA updates to a draft in place. The updates are zero at first, so the draft's output does not change.

    Afterwards, only the updates have gradients. The draft is still a transformers model. Its `save_pretrained` writes
    only the updates, which keeps checkpoints small.

    Args:
        draft: A causal LM.
        lora: Options of the updates.
        seed: Seed of the initial weights of the updates.

    Raises:
        ValueError: A name in `lora.targets` matches no linear layer of the draft, or the head would be adapted.
    """
    from peft import LoraConfig

    linear = [name for name, part in draft.named_modules() if isinstance(part, (torch.nn.Linear, Conv1D))]
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # declared as int, but works as float
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
                raise ValueError(f"lora_targets must be linear layers of the draft, {given}; choose from {ends}")
    # The seed is set inside a fork, so that drawing the updates does not change the caller's random numbers.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # peft warns if one model has both Linear layers and Conv1D layers, which store their weights transposed. The
        # warning is hidden, because peft adapts both kinds correctly.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        torch.manual_seed(seed)
        draft.add_adapter(config)
    head = draft.get_output_embeddings()
    if hasattr(head, "base_layer"):
        raise ValueError(
            f"lora_targets must not include the head, whose gradient is computed separately, {given}; give {ALL_LINEAR}"
        )


def has_lora(draft: PreTrainedModel) -> bool:
    """Returns whether a draft has LoRA updates that are not merged yet."""
    return bool(getattr(draft, "_hf_peft_config_loaded", False))


def load_lora(draft: PreTrainedModel, folder: str | Path) -> None:
    """Loads LoRA updates into a draft that `add_lora` has adapted.

    Args:
        draft: The adapted draft.
        folder: Folder to which `save_pretrained` of an adapted draft wrote the updates.
    """
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(draft, load_file(Path(folder) / "adapter_model.safetensors"))


@torch.no_grad()
def merge_lora(draft: PreTrainedModel) -> None:
    """Merges LoRA updates into the weights of a draft in place. The draft is an ordinary model afterwards."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in list(draft.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            parent, _, attribute = name.rpartition(".")
            setattr(draft.get_submodule(parent), attribute, layer.get_base_layer())
    # Without the next two lines, transformers would still save the model as an adapter.
    draft._hf_peft_config_loaded = False
    del draft.peft_config
    # peft froze all weights of the draft, so they are made trainable again.
    draft.requires_grad_(True)
