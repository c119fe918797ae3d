"""Configurations of drafts that are made anew: from a JSON file, a model's folder, or another model with changes."""

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
"""What a config.json has that says nothing of the architecture's sizes."""
CONTRADICTIONS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What architectures raise where the values of their configuration do not fit together."""
NOT_PER_LAYER = ("token_id", "limit", "multipliers")
"""How lists are called that only by chance are as long as there are layers."""

Settings = dict[str, Any]


def read_settings(given: Sequence[str]) -> tuple[str | None, Settings]:
    """Takes apart what --draft_config was given.

    Args:
        given: A JSON file, folder or Hugging Face id; `key=value` pairs, values as in JSON or plain words; or both.

    Returns:
        The file, folder or id, if any; and the pairs.

    Raises:
        ValueError: There are two of the first, or a key twice.
    """
    base: str | None = None
    settings: Settings = {}
    for word in given:
        key, equals, value = word.partition("=")
        if equals:
            if key in settings:
                raise ValueError(f"draft_config must have each key once, got {key} twice; leave one out")
            settings[key] = _value(value)
        elif base is None:
            base = word
        else:
            raise ValueError(
                f"draft_config must be one file or folder and key=value pairs, got {base} and {word}; give one of them"
            )
    return base, settings


def _value(text: str) -> object:
    plain = {"True": True, "False": False, "None": None}
    if text in plain:
        return plain[text]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def base_config(name: str, *, revision: str | None, trust_remote_code: bool) -> PreTrainedConfig:
    """Reads the configuration that a new draft's is to begin with.

    Args:
        name: JSON file with a model_type, or folder or Hugging Face id of a model.
        revision: Branch, tag or commit of the hub.
        trust_remote_code: Whether code from its repository may run.

    Raises:
        ValueError: There is none, or a file has keys that its architecture does not know.
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
            f"({said}); write one such as a model's config.json"
        ) from error
    values = {key: value for key, value in values.items() if key not in ELSEWHERE and not key.startswith("_")}
    return changed(made, values)


def changed(base: PreTrainedConfig, settings: Mapping[str, object]) -> PreTrainedConfig:
    """Makes a configuration of the same architecture with some values changed.

    What hangs on a changed value follows where it was not given too: lists with a value for each layer are cut or made
    anew with num_hidden_layers, and head_dim where it was hidden_size / num_attention_heads.

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
                del values[key]  # the architecture's own pattern
    if given.keys() & {heads, width} and values.get("head_dim") and values["head_dim"] * values[heads] == values[width]:
        del values["head_dim"]
    values |= given
    try:
        return cls(**values)
    except (*CONTRADICTIONS, StrictDataclassError) as error:
        raise _contradiction(_listed(settings), error) from error


def per_layer(values: Mapping[str, Any], num_layers: object) -> list[str]:
    """Names the lists that have a value for each layer."""
    return [
        key
        for key, value in values.items()
        if isinstance(value, (list, tuple)) and len(value) == num_layers and not key.endswith(NOT_PER_LAYER)
    ]


def check_buildable(config: PreTrainedConfig, asked: str, *, trust_remote_code: bool) -> int:
    """Builds the model without memory for its weights.

    Args:
        config: Of a causal LM.
        asked: What it was made of, for the message.
        trust_remote_code: Whether the model's own code may run.

    Returns:
        How many parameters it has; tied ones count once.

    Raises:
        ValueError: There is no causal LM of this architecture, or the values contradict each other.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except CONTRADICTIONS as error:
        raise _contradiction(asked, error) from error
    return sum(parameter.numel() for parameter in model.parameters())


def with_tokens_of(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, vocab_size: int, settings: Mapping[str, object]
) -> PreTrainedConfig:
    """Gives a configuration the tokenizer's vocabulary and special tokens, but for what `settings` say.

    Raises:
        ValueError: `settings` say a vocabulary that is too small.
    """
    tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    tokens = {key: value for key, value in tokens.items() if hasattr(config, key)}
    made = changed(config, {"vocab_size": vocab_size, **tokens, **settings})
    if made.vocab_size < vocab_size:
        raise ValueError(
            f"vocab_size must be at least the tokenizer's {vocab_size}, got vocab_size={made.vocab_size}; leave it out"
        )
    return made


def _check_known(settings: Iterable[str], known: set[str]) -> None:
    for key in settings:
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.0)
            raise ValueError(
                f"draft_config must have keys that the architecture knows, got {key}; the nearest is {near[0]}"
            )


def _listed(settings: Mapping[str, object]) -> str:
    return "draft_config=" + " ".join(f"{key}={value}" for key, value in settings.items())


def _contradiction(asked: str, error: Exception) -> ValueError:
    said = str(error).strip().rpartition("\n")[2].strip().removeprefix("ValueError: ").rstrip(".")
    return ValueError(f"draft must have a configuration that fits together, got {asked} ({said}); change a value")
