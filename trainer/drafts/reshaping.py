"""Changes to the shape of a loaded model: fewer layers, or embeddings with another number of rows."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig

from logitstore.models.split_lm import SplitLM
from trainer.drafts.configs import CONTRADICTIONS, per_layer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def chosen_layers(text: str, num_layers: int) -> tuple[int, ...]:
    """Parses the value of --draft_layers.

    Args:
        text: Either the indices of the layers to keep (counted from 0, in ascending order, separated by commas), or a
            single number: how many layers to keep, spaced evenly from the first layer to the last.
        num_layers: Number of layers of the model.

    Returns:
        The layer numbers, in ascending order.

    Raises:
        ValueError: The text has neither of the two forms, or the model does not have these layers.
    """
    words = [word.strip() for word in text.split(",")]
    if len(words) > 1 and not words[-1]:  # "3," means layer 3, while "3" means three layers
        words.pop()
    if not all(word.isdecimal() for word in words):
        raise ValueError(
            f"draft_layers must be a number of layers, or layer numbers separated by commas, got draft_layers={text}; "
            "examples: 4, or 0,9,18,27"
        )
    numbers = tuple(int(word) for word in words)
    if "," not in text:
        if not 1 <= numbers[0] <= num_layers:
            raise ValueError(
                f"draft_layers must be between 1 and {num_layers}, the number of layers of the model, got "
                f"draft_layers={text}; change it"
            )
        return tuple(np.linspace(0, num_layers - 1, numbers[0]).round().astype(int).tolist())
    if list(numbers) != sorted(set(numbers)) or numbers[-1] >= num_layers:
        raise ValueError(
            f"draft_layers must be layer numbers in ascending order, each from 0 to {num_layers - 1}, got "
            f"draft_layers={text}; change them"
        )
    return numbers


def cut_config(config: PreTrainedConfig, layers: tuple[int, ...]) -> PreTrainedConfig:
    """Returns the configuration of a model that keeps only some layers.

    In the configuration's lists with one value per layer, only the values of the kept layers remain.

    Args:
        config: Configuration of the whole model; it is not modified.
        layers: Numbers of the layers to keep, counted from 0, in ascending order.
    """
    made = copy.deepcopy(config)
    text = made.get_text_config()
    for key in per_layer(vars(text), text.num_hidden_layers):
        values = getattr(text, key)
        setattr(text, key, type(values)(values[layer] for layer in layers))
    text.num_hidden_layers = len(layers)
    return made


def cut_layers(model: PreTrainedModel, layers: tuple[int, ...], *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Makes a model from some layers of another model. All weights outside the layers are kept.

    Args:
        model: A causal LM whose backbone has one list of layers.
        layers: Numbers of the layers to keep, counted from 0, in ascending order.
        trust_remote_code: Whether code from the model's repository may run.

    Returns:
        A new model on the CPU, in the dtype of `model`.

    Raises:
        ValueError: The model does not have exactly one list of its layers, or a layer would compute something else at
            its new position.
    """
    config = cut_config(model.config, layers)
    prefix = _layers_of(model)
    # The initial weights are drawn inside a fork, so that the caller's random numbers do not change. These weights are
    # replaced below.
    with torch.random.fork_rng(devices=[]):
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
            raise _refusal(model, layers, " ".join(str(error).split())[:200]) from error
    made.train(model.training)
    old, new = model.get_submodule(prefix), made.get_submodule(prefix)
    for place, layer in enumerate(layers):
        _check_alike(model, layers, (old[layer], layer), (new[place], place))  # type: ignore[index]
    made.tie_weights()
    made.generation_config = copy.deepcopy(model.generation_config)
    made.config.name_or_path = model.name_or_path
    return made


def _layers_of(model: PreTrainedModel) -> str:
    """Returns the name of the submodule that is the model's list of layers.

    Raises:
        ValueError: The model has no list of its layers, or several.
    """
    count = model.config.get_text_config().num_hidden_layers
    # Only the backbone is used, so the vocabulary size given here does not matter.
    backbone = SplitLM(model, 1).backbone
    found = [name for name, part in backbone.named_modules() if isinstance(part, nn.ModuleList) and len(part) == count]
    # A layer can contain a list of the same length, such as a list of experts. Only outermost lists count.
    outer = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    if len(outer) != 1:
        raise ValueError(
            f"draft_layers needs a draft with one list of {count} layers, got draft={model.name_or_path} "
            f"({type(model).__name__}) with {len(outer)} such lists; give another --draft, or --draft_config"
        )
    names: dict[nn.Module, str] = {part: name for name, part in model.named_modules()}
    return names[backbone.get_submodule(outer[0])]


def _source(name: str, prefix: str, layers: tuple[int, ...]) -> str:
    """Translates the name of a weight in the cut model into its name in the whole model.

    Args:
        name: Name of the weight in the cut model.
        prefix: Name of the list of layers, the same in both models.
        layers: Numbers of the layers that were kept.
    """
    if not name.startswith(f"{prefix}."):
        return name
    place, _, rest = name.removeprefix(f"{prefix}.").partition(".")
    return f"{prefix}.{layers[int(place)]}.{rest}"


def _check_alike(
    model: PreTrainedModel, layers: tuple[int, ...], old: tuple[nn.Module, int], new: tuple[nn.Module, int]
) -> None:
    """Raises ValueError if a layer computes something else at its new position than at its old position.

    The weights of both layers are already equal. An architecture may also derive values from a layer's number, such as
    the size of an attention window. Such values are plain attributes of the layer's modules, so the plain attributes
    are compared.

    Args:
        model: The whole model, for the message.
        layers: Numbers of the layers that were kept, for the message.
        old: The layer in the whole model, and the layer's number in that model.
        new: The layer in the cut model, and the layer's number in that model.
    """
    for (name, was), (_, now) in zip(old[0].named_modules(), new[0].named_modules(), strict=True):
        before, after = _plain_attributes(was), _plain_attributes(now)
        for key in before.keys() | after.keys():
            values = before.get(key), after.get(key)
            # An attribute that holds the number of the layer itself may differ.
            if values[0] != values[1] and values != (old[1], new[1]):
                part = f"{name}.{key}".strip(".") or "kind"
                said = f"{part} of layer {old[1]} is {values[0]}, but {values[1]} as layer {new[1]}"
                raise _refusal(model, layers, said)


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Returns the attributes of a module whose values are plain, and the type of the module under the key ""."""
    kinds = (bool, int, float, str, type(None))
    return {key: value for key, value in vars(module).items() if isinstance(value, kinds)} | {"": type(module)}


def _refusal(model: PreTrainedModel, layers: tuple[int, ...], reason: str) -> ValueError:
    """Returns the error for layers that cannot be moved to other positions in the model."""
    return ValueError(
        "draft_layers must be layers that compute the same at their new positions, got "
        f"draft_layers={','.join(map(str, layers))} of {model.name_or_path} ({type(model).__name__}: {reason}); "
        "choose other layers"
    )


def pad_vocabulary(model: PreTrainedModel, padded_vocab_size: int, vocab_size: int) -> None:
    """Changes the number of padding rows of the embeddings and of the head, in place. Tied weights stay tied.

    Args:
        model: A causal LM.
        padded_vocab_size: New number of rows, including the padding; at least `vocab_size`.
        vocab_size: Size of the true vocabulary, whose rows stay as they are.

    Raises:
        ValueError: The model's embeddings cannot be resized.
    """
    model.resize_token_embeddings(padded_vocab_size, mean_resizing=False)
    rows = [len(part.weight) for part in (model.get_input_embeddings(), model.get_output_embeddings())]  # type: ignore[arg-type]
    if rows != [padded_vocab_size] * 2:
        raise ValueError(
            f"pad_vocab_size needs a model whose embeddings can be resized, got draft={model.name_or_path} "
            f"({type(model).__name__}), which have {rows[0]} and {rows[1]} rows after resizing; omit --pad_vocab_size"
        )
    settle_padding(model, vocab_size)


@torch.no_grad()
def settle_padding(model: PreTrainedModel, vocab_size: int) -> None:
    """Sets the padding rows of the head to the mean of its other rows, in place.

    Training never uses the logits of padding rows, but servers do. A padding row that holds the mean never has the
    largest logit. By Jensen's inequality, the probability of its token is at most 1 / vocab_size, and usually thousands
    of times smaller. Training changes the mean, so call this function before a model is saved for use.

    Args:
        model: A causal LM whose weights are not divided among processes.
        vocab_size: Size of the true vocabulary; the rows from this number on are padding.
    """
    head = model.get_output_embeddings()
    for values in (head.weight, getattr(head, "bias", None)):
        if values is not None and len(values) > vocab_size:
            values[vocab_size:] = values[:vocab_size].mean(0, dtype=torch.float32).to(values.dtype)


def neutral_generation_config(draft: PreTrainedModel) -> GenerationConfig:
    """Returns a generation config that holds only the draft's special tokens.

    If the result kept the repetition_penalty or the temperature of the draft's own generation config, the draft would
    propose other tokens in speculative decoding.
    """
    old = draft.generation_config or GenerationConfig()
    return GenerationConfig(bos_token_id=old.bos_token_id, eos_token_id=old.eos_token_id, pad_token_id=old.pad_token_id)
