"""Loads models, configurations and tokenizers from Hugging Face. Errors say in one line why the loading failed."""

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
    """Name of a model, and the options with which the model is loaded."""

    name: str
    """Hugging Face id or folder."""
    revision: str | None = None
    """Branch, tag or commit on the hub; None for the default branch."""
    dtype: str = "auto"
    """Data type of the weights; "auto" for the data type in the model's configuration."""
    attn_implementation: str | None = None
    """Name of the attention implementation in transformers, such as sdpa; None leaves the choice to transformers."""
    trust_remote_code: bool = False
    """Whether Python code from the model's repository may run."""


def load_config(source: ModelSource, *, what: str) -> PreTrainedConfig:
    """Reads a model's configuration, without its weights.

    Args:
        source: The model.
        what: Role of the model in error messages: target, draft, reference NAME.

    Raises:
        ValueError: The model does not exist, or transformers does not know its kind of configuration.
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
        source: The model, or a folder that holds only a tokenizer.
        what: Name in error messages: "tokenizer", or the role of the model that has the tokenizer, such as target.

    Raises:
        ValueError: No tokenizer was found, or it cannot be loaded.
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
    """Loads a causal LM and puts it into evaluation mode.

    Args:
        source: The model.
        what: Role of the model in error messages: target, draft, reference NAME.
        device: Device to move the model to.

    Raises:
        ValueError: The weights cannot be read, or the requested attention implementation does not work on
            this machine.
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
        # If no implementation was requested, the cause of the error is not known here. The error is raised unchanged.
        if source.attn_implementation is None:
            raise
        # Messages of transformers are long. The first sentence states the cause.
        reason = " ".join(str(error).split()).partition(". ")[0].rstrip(".")
        raise ValueError(
            f"attn_implementation must be one that works with {what}={source.name} here, got attn_implementation="
            f"{source.attn_implementation} ({reason}); omit it, or give sdpa or eager"
        ) from error
    model.eval()
    model.to(device)  # type: ignore[arg-type]  # transformers types its wrapper wrongly
    return model


def _refusal(what: str, rule: str, name: str, error: Exception, next_step: str) -> ValueError:
    """Returns the error to raise when something cannot be loaded.

    Args:
        what: Name in the message, such as target.
        rule: Requirement that was not met: the words that follow "must" in the message.
        name: Hugging Face id or folder, as given.
        error: Error that was raised on loading.
        next_step: Advice that ends the message if `name` is a folder on this machine.
    """
    said = str(error).strip().partition("\n")[0].strip()
    # A first line that ends with a colon only introduces a list of causes: it explains nothing by itself.
    reason = "" if said.endswith(":") else f" ({said.rstrip('.')})"
    if not Path(name).is_dir():
        next_step = "check the name: it is not a folder here, and it could not be loaded from the hub"
    return ValueError(f"{what} must {rule}, got {what}={name}{reason}; {next_step}")


@contextmanager
def loading_bars(wanted: bool) -> Iterator[None]:
    """Context manager that hides transformers' bars for loading and saving weights, unless they are wanted.

    Args:
        wanted: Whether to show the bars.
    """
    # Bars that were off before must stay off afterwards.
    if wanted or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
