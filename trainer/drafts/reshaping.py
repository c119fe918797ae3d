"""Drafts of another shape than they were loaded with: fewer layers, another number of rows in the embeddings."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from logitstore.models.split_lm import SplitLM
from trainer.drafts.configs import CONTRADICTIONS, per_layer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def chosen_layers(text: str, num_layers: int) -> tuple[int, ...]:
    """Reads --draft_layers.

    Args:
        text: Numbers of layers from 0, rising, with commas; or one number: so many, evenly spaced from first to last.
        num_layers: How many there are.

    Raises:
        ValueError: It is neither, or names layers that are not there.
    """
    words = [word.strip() for word in text.split(",")]
    if len(words) > 1 and not words[-1]:  # "0," is layer 0, "1" any one layer
        words.pop()
    if not all(word.isdecimal() for word in words):
        raise ValueError(
            f"draft_layers must be a number of layers or their numbers with commas, got draft_layers={text}; "
            "give 4, or 0,9,18,27"
        )
    numbers = tuple(int(word) for word in words)
    if "," not in text:
        if not 1 <= numbers[0] <= num_layers:
            raise ValueError(
                f"draft_layers must be between 1 and the model's {num_layers}, got draft_layers={text}; give fewer"
            )
        return tuple(np.linspace(0, num_layers - 1, numbers[0]).round().astype(int).tolist())
    if list(numbers) != sorted(set(numbers)) or numbers[-1] >= num_layers:
        raise ValueError(
            f"draft_layers must be rising numbers from 0 to {num_layers - 1}, got draft_layers={text}; change them"
        )
    return numbers


def cut_config(config: PreTrainedConfig, layers: tuple[int, ...]) -> PreTrainedConfig:
    """Returns the configuration of a model with these layers alone; lists with a value for each layer are cut too."""
    made = copy.deepcopy(config)
    text = made.get_text_config()
    for key in per_layer(vars(text), text.num_hidden_layers):
        values = getattr(text, key)
        setattr(text, key, type(values)(values[layer] for layer in layers))
    text.num_hidden_layers = len(layers)
    return made


def cut_layers(model: PreTrainedModel, layers: tuple[int, ...], *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Makes a model of some of another's layers, with its embeddings, norms and head; in its dtype, on the CPU.

    Args:
        model: A causal LM whose backbone has one list of layers.
        layers: Which to keep, rising from 0.
        trust_remote_code: Whether the model's code is its own.

    Raises:
        ValueError: It has no such list, or some layers are others at their new places.
    """
    config = cut_config(model.config, layers)
    prefix = _layers_of(model)
    with torch.random.fork_rng(devices=[]):  # its first weights are not kept
        try:
            made: PreTrainedModel = AutoModelForCausalLM.from_config(
                config,
                dtype=model.dtype,
                attn_implementation=config._attn_implementation,
                trust_remote_code=trust_remote_code,
            )
            state = made.state_dict()
            made.load_state_dict({name: model.state_dict()[_source(name, prefix, layers)] for name in state})
        except CONTRADICTIONS as error:
            raise _not_alone(model, layers, " ".join(str(error).split())[:200]) from error
    made.train(model.training)
    old, new = model.get_submodule(prefix), made.get_submodule(prefix)
    for place, layer in enumerate(layers):
        _check_alike(model, layers, (old[layer], layer), (new[place], place))  # type: ignore[index]
    made.tie_weights()
    made.generation_config = copy.deepcopy(model.generation_config)
    made.config.name_or_path = model.name_or_path
    return made


def _layers_of(model: PreTrainedModel) -> str:
    """The name of the list of layers."""
    count = model.config.get_text_config().num_hidden_layers
    backbone = SplitLM(model, 1).backbone
    found = [name for name, part in backbone.named_modules() if isinstance(part, nn.ModuleList) and len(part) == count]
    outer = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    if len(outer) != 1:
        raise ValueError(
            f"draft must have one list of its {count} layers to cut some, got draft={model.name_or_path} "
            f"({type(model).__name__}) with {len(outer)}; give another model, or --draft_config"
        )
    names: dict[nn.Module, str] = {part: name for name, part in model.named_modules()}
    return names[backbone.get_submodule(outer[0])]


def _source(name: str, prefix: str, layers: tuple[int, ...]) -> str:
    """The name in the model of what is `name` in the one that is cut."""
    if not name.startswith(f"{prefix}."):
        return name
    place, _, rest = name.removeprefix(f"{prefix}.").partition(".")
    return f"{prefix}.{layers[int(place)]}.{rest}"


def _check_alike(
    model: PreTrainedModel, layers: tuple[int, ...], old: tuple[nn.Module, int], new: tuple[nn.Module, int]
) -> None:
    """Raises ValueError if a layer computes something else at its new place than at its old one.

    Weights are equal by now; what architectures derive from a layer's number, such as windows, is in plain values.
    """
    for (name, was), (_, now) in zip(old[0].named_modules(), new[0].named_modules(), strict=True):
        before, after = _plain(was), _plain(now)
        for key in before.keys() | after.keys():
            values = before.get(key), after.get(key)
            if values[0] != values[1] and values != (old[1], new[1]):
                part = f"{name}.{key}".strip(".") or "kind"
                said = f"{part} of layer {old[1]} is {values[0]}, as layer {new[1]} {values[1]}"
                raise _not_alone(model, layers, said)


def _plain(module: nn.Module) -> dict[str, Any]:
    kinds = (bool, int, float, str, type(None))
    return {key: value for key, value in vars(module).items() if isinstance(value, kinds)} | {"": type(module)}


def _not_alone(model: PreTrainedModel, layers: tuple[int, ...], reason: str) -> ValueError:
    return ValueError(
        f"draft_layers must be layers that are the same at other places, got draft_layers={','.join(map(str, layers))} "
        f"of {model.name_or_path} ({type(model).__name__}: {reason}); choose others"
    )


def pad_vocabulary(model: PreTrainedModel, padded_vocab_size: int, vocab_size: int) -> None:
    """Gives the embeddings another number of rows beyond the true vocabulary, in place; tied ones stay tied.

    Args:
        model: A causal LM.
        padded_vocab_size: Rows that they are to have, at least `vocab_size`.
        vocab_size: The true vocabulary, whose rows stay as they are.

    Raises:
        ValueError: The model's embeddings cannot be resized.
    """
    model.resize_token_embeddings(padded_vocab_size, mean_resizing=False)
    rows = [len(part.weight) for part in (model.get_input_embeddings(), model.get_output_embeddings())]  # type: ignore[arg-type]
    if rows != [padded_vocab_size] * 2:
        raise ValueError(
            f"pad_vocab_size must be left out with a model whose embeddings cannot be resized, got draft="
            f"{model.name_or_path} ({type(model).__name__}), whose have {rows} rows; leave it out"
        )
    settle_padding(model, vocab_size)


@torch.no_grad()
def settle_padding(model: PreTrainedModel, vocab_size: int) -> None:
    """Makes the head's rows beyond the true vocabulary the mean of those within, in place.

    Training never sees them, but servers do. Where the logit is the mean of the others it is never the largest, and by
    Jensen's inequality its probability is at most 1 / vocab_size, usually thousands of times less. To be called before
    a model is saved for use: the mean moves in training.

    Args:
        model: A causal LM, its weights whole on this process.
        vocab_size: The true vocabulary.
    """
    head = model.get_output_embeddings()
    for values in (head.weight, getattr(head, "bias", None)):
        if values is not None and len(values) > vocab_size:
            values[vocab_size:] = values[:vocab_size].mean(0, dtype=torch.float32).to(values.dtype)
