"""Makes the configuration of a draft that gets random weights.

The configuration is read from a JSON file or a model. Then the values that the user gave are put into it.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM

from logitstore.models.loading import ModelSource, load_config

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

ELSEWHERE = frozenset({"architectures", "auto_map", "model_type", "torch_dtype", "transformers_version"})
"""Keys of a config.json that are not settings of the architecture; they are not copied to the new configuration."""
CONTRADICTIONS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""Exceptions that architectures raise if values of their configuration contradict each other."""
NOT_PER_LAYER = ("token_id", "limit", "multipliers")
"""Endings of configuration keys. Under a key with such an ending, a list does not hold one value per layer, even if it
has as many values as the model has layers."""

Settings = dict[str, Any]


def read_settings(given: Sequence[str]) -> tuple[str | None, Settings]:
    """Parses the value of --draft_config.

    Args:
        given: Words that the user gave for --draft_config: at most one JSON file, folder or Hugging Face id, and any
            number of `key=value` pairs. The value of a pair is JSON or a plain word.

    Returns:
        The file, folder or id (None if only pairs are given), and the values of the pairs, keyed by their keys.

    Raises:
        ValueError: Two or more of the words are not `key=value` pairs, or a key is given twice.
    """
    base: str | None = None
    settings: Settings = {}
    for word in given:
        key, equals, value = word.partition("=")
        if equals:
            if key in settings:
                raise ValueError(f"draft_config must have each key once, got {key} twice; omit one of them")
            settings[key] = _value(value)
        elif base is None:
            base = word
        else:
            raise ValueError(
                f"draft_config must have at most one word that is not a key=value pair, got {base} and {word}; omit "
                "one of them"
            )
    return base, settings


def _value(text: str) -> object:
    """Parses a value: first as True, False or None, then as JSON. Text that is neither is returned as it is."""
    plain = {"True": True, "False": False, "None": None}
    if text in plain:
        return plain[text]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def base_config(name: str, *, revision: str | None, trust_remote_code: bool) -> PreTrainedConfig:
    """Reads the configuration that a new draft starts from.

    Args:
        name: JSON file with a model_type, or folder or Hugging Face id of a model.
        revision: Branch, tag or commit on the hub; None for the default branch.
        trust_remote_code: Whether code from the model's repository may run.

    Returns:
        The configuration. If the model has several parts, such as vision and text, only the configuration of the text
        part is returned.

    Raises:
        ValueError: No configuration is found, the file is malformed, or it has keys that its architecture does not
            know.
    """
    path = Path(name)
    if not path.is_file():
        source = ModelSource(name=name, revision=revision, trust_remote_code=trust_remote_code)
        config = load_config(source, what="draft_config")
        return config.get_text_config()
    try:
        values = json.loads(path.read_text())
        made = AutoConfig.for_model(values["model_type"])
    except (OSError, json.JSONDecodeError, TypeError, KeyError, UnicodeDecodeError, ValueError) as error:
        said = "no model_type in it" if isinstance(error, KeyError) else str(error).partition("\n")[0][:200]
        raise ValueError(
            f"draft_config must be a JSON object with a model_type that transformers knows, got draft_config={name} "
            f"({said}); write it like a model's config.json"
        ) from error
    values = {key: value for key, value in values.items() if key not in ELSEWHERE and not key.startswith("_")}
    return changed(made, values)


def changed(base: PreTrainedConfig, settings: Mapping[str, object]) -> PreTrainedConfig:
    """Makes a configuration of the same architecture with some values changed.

    Values that depend on a changed value change with it, unless they are in `settings` too. If the number of layers
    falls, lists with one value per layer are cut. If it rises, these lists are replaced by the architecture's default.
    If hidden_size or num_attention_heads changes, head_dim is computed again, but only if it was equal to
    hidden_size / num_attention_heads before.

    Args:
        base: Configuration to start from; it is not modified.
        settings: New values, keyed by the architecture's own keys in config.json, or by the names that transformers
            uses for these keys in all architectures (`attribute_map`).

    Raises:
        ValueError: A key is unknown, or the values contradict each other.
    """
    cls = type(base)
    names = dict(getattr(cls, "attribute_map", {}))
    values = {key: value for key, value in base.to_dict().items() if key not in ELSEWHERE and not key.startswith("_")}
    given = {names.get(key, key): value for key, value in settings.items()}
    _check_known(settings, {*values, *names})

    layers, heads, width = (names.get(key, key) for key in ("num_hidden_layers", "num_attention_heads", "hidden_size"))
    before, after = values.get(layers), given.get(layers)
    if isinstance(before, int) and isinstance(after, int) and after != before:
        for key in per_layer(values, before):
            values[key] = values[key][:after]
            if after > before:
                del values[key]  # the architecture's default fills in all layers
    # Without the key, the architecture computes head_dim from the new sizes.
    if given.keys() & {heads, width} and values.get("head_dim") and values["head_dim"] * values[heads] == values[width]:
        del values["head_dim"]
    values |= given
    try:
        return cls(**values)
    except (*CONTRADICTIONS, StrictDataclassError) as error:
        raise _contradiction(_listed(settings), error) from error


def per_layer(values: Mapping[str, Any], num_layers: object) -> list[str]:
    """Returns the keys of the lists that have one value per layer."""
    return [
        key
        for key, value in values.items()
        if isinstance(value, (list, tuple)) and len(value) == num_layers and not key.endswith(NOT_PER_LAYER)
    ]


def check_buildable(config: PreTrainedConfig, asked: str, *, trust_remote_code: bool) -> int:
    """Checks that a model can be built from a configuration, and returns its number of parameters.

    Args:
        config: Configuration of a causal LM.
        asked: Text for the error message: the option that named the configuration, and its value.
        trust_remote_code: Whether code from the model's repository may run.

    Returns:
        Number of parameters; tied parameters count once.

    Raises:
        ValueError: The architecture has no causal LM, or the values contradict each other.
    """
    try:
        # The meta device allocates no memory for the weights.
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except CONTRADICTIONS as error:
        raise _contradiction(asked, error) from error
    return sum(parameter.numel() for parameter in model.parameters())


def with_tokens_of(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, vocab_size: int, settings: Mapping[str, object]
) -> PreTrainedConfig:
    """Makes a configuration with the vocabulary and the special tokens of a tokenizer.

    Args:
        config: Configuration to start from; it is not modified.
        tokenizer: Tokenizer of the store.
        vocab_size: Size of the tokenizer's true vocabulary.
        settings: Configuration values by key. These values override the values that come from the tokenizer.

    Raises:
        ValueError: `settings` contains a vocab_size that is smaller than the true vocabulary.
    """
    tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    # Some architectures lack some of these keys, and `changed` refuses a key that the architecture does not know.
    tokens = {key: value for key, value in tokens.items() if hasattr(config, key)}
    made = changed(config, {"vocab_size": vocab_size, **tokens, **settings})
    if made.vocab_size < vocab_size:
        raise ValueError(
            f"vocab_size must be at least the tokenizer's {vocab_size}, got vocab_size={made.vocab_size}; omit it"
        )
    return made


def _check_known(settings: Iterable[str], known: set[str]) -> None:
    """Raises ValueError if a key is unknown. Most architectures accept any key, so a misspelling would go unnoticed."""
    for key in settings:
        if key not in known:
            # With a cutoff of 0 there is always a nearest key to name.
            near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.0)
            raise ValueError(
                f"draft_config must have keys that the architecture knows, got {key}; the most similar one is {near[0]}"
            )


def _listed(settings: Mapping[str, object]) -> str:
    """Returns settings as text for a message: "draft_config=", followed by the settings as key=value pairs."""
    return "draft_config=" + " ".join(f"{key}={value}" for key, value in settings.items())


def _contradiction(asked: str, error: Exception) -> ValueError:
    """Returns the error for a configuration whose values contradict each other."""
    # Validation errors have several lines, of which the last one gives the reason.
    said = str(error).strip().rpartition("\n")[2].strip().removeprefix("ValueError: ").rstrip(".")
    return ValueError(f"the values of the draft's configuration must agree, got {asked} ({said}); change a value")
