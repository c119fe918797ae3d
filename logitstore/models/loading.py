"""Loads models, configurations and tokenizers of Hugging Face, and says what is wrong where one cannot be loaded."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model, and how to load it."""

    name: str
    """Hugging Face id or folder."""
    revision: str | None = None
    """Branch, tag or commit on the hub; None for the default branch."""
    dtype: str = "auto"
    """Data type of the weights; "auto" takes the configuration's."""
    attn_implementation: str | None = None
    """Implementation of attention, by its name in transformers; None for transformers' own choice."""
    trust_remote_code: bool = False
    """Whether code from the model's repository may run."""


def load_config(source: ModelSource, *, what: str) -> PreTrainedConfig:
    """Reads a model's configuration, without its weights.

    Args:
        source: The model.
        what: Name of the model's part for error messages: target, draft, reference NAME.

    Raises:
        ValueError: There is no such model, or transformers does not know its configuration.
    """
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            source.name, revision=source.revision, trust_remote_code=source.trust_remote_code
        )
    except (OSError, ValueError) as error:
        rule = "be a Hugging Face id or a folder with a config.json"
        raise _refusal(what, rule, source.name, error, "save the model there") from error
    return config


def load_tokenizer(source: ModelSource, *, what: str) -> PreTrainedTokenizerBase:
    """Loads a model's tokenizer.

    Args:
        source: The model, or a folder with a tokenizer alone.
        what: Name of the argument for error messages: tokenizer, or the part of the model that has it.

    Raises:
        ValueError: There is no tokenizer.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source.name, revision=source.revision, trust_remote_code=source.trust_remote_code
        )
    except (OSError, ValueError) as error:
        rule = "be a Hugging Face id or a folder with tokenizer files" if what == "tokenizer" else "have a tokenizer"
        raise _refusal(what, rule, source.name, error, "save one there") from error
    return tokenizer


def load_model(source: ModelSource, *, what: str, device: torch.device | str) -> PreTrainedModel:
    """Loads a causal LM for inference.

    Args:
        source: The model.
        what: Name of the model's part for error messages: target, draft, reference NAME.
        device: Device that the model is moved to.

    Raises:
        ValueError: The weights cannot be read, or this machine lacks the implementation of attention.
    """
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            source.name,
            revision=source.revision,
            dtype=source.dtype,
            attn_implementation=source.attn_implementation,
            trust_remote_code=source.trust_remote_code,
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{what} must have weights that can be read, got {what}={source.name} ({error}); copy or download it again"
        ) from error
    except (ImportError, ValueError) as error:
        if source.attn_implementation is None:
            raise
        reason = " ".join(str(error).split()).partition(". ")[0].rstrip(".")
        raise ValueError(
            f"attn_implementation must be one that {what}={source.name} can run with here, got attn_implementation="
            f"{source.attn_implementation} ({reason}); leave it out, or give sdpa or eager"
        ) from error
    model.eval()
    model.to(device)  # type: ignore[arg-type]  # transformers types its wrapper wrongly
    return model


def _refusal(what: str, rule: str, name: str, error: Exception, mend: str) -> ValueError:
    """What to raise where nothing can be loaded; `mend` is what to do with a folder."""
    said = str(error).strip().partition("\n")[0].strip()
    # Of a list of causes, the first line is but the start.
    reason = "" if said.endswith(":") else f" ({said.rstrip('.')})"
    if not Path(name).is_dir():
        mend = "check the name: it is no folder here, and the hub did not give it"
    return ValueError(f"{what} must {rule}, got {what}={name}{reason}; {mend}")


@contextmanager
def loading_bars(wanted: bool) -> Iterator[None]:
    """Turns transformers' own progress bars, of loading and saving weights, off for a while unless they are wanted."""
    if wanted or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
