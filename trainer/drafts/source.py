"""Makes the draft to train: loads it, cuts it from a larger model, or initialises it with random weights.

If the options ask for it, the embeddings of this draft are then padded, and LoRA updates are added.

`plan_draft` decides how the draft is made, and raises most errors before any weights are loaded. `make_draft` carries
out the plan. The individual steps are in `trainer.drafts.configs`, `trainer.drafts.reshaping` and
`trainer.drafts.lora`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM

from logitstore.models.identity import check_model, tokenizer_spec
from logitstore.models.loading import ModelSource, load_config, load_model, load_tokenizer
from logitstore.models.probes import check_halves
from logitstore.models.split_lm import SplitLM
from trainer.drafts.configs import base_config, changed, check_buildable, read_settings, with_tokens_of
from trainer.drafts.lora import add_lora
from trainer.drafts.reshaping import chosen_layers, cut_config, cut_layers, pad_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from logitstore.format.spec import StoreSpec
    from trainer.drafts.lora import Lora

LIKE_TARGET = "target"
"""Value of pad_vocab_size that stands for the padded vocabulary size of the target."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftSource:
    """Options that say what the draft is made from. The constructor raises ValueError if they contradict each other."""

    draft: str | None = None
    """Hugging Face id or folder of the model to start from. If `config` is given, the weights of this model are not
    used. Its tokenizer is used, and also its configuration, unless `config` names another one."""
    config: tuple[str, ...] = ()
    """Words of --draft_config: a JSON file, folder or Hugging Face id of a configuration, and key=value pairs that
    change it. The draft then gets random weights."""
    layers: str | None = None
    """Layers of `draft` to keep: their numbers, such as "0,9,18,27", or how many, such as "4". None keeps all."""
    pad_vocab_size: str | None = None
    """Number of rows that the embeddings are padded to. "target" stands for the number of rows of the target's
    embeddings; None leaves the embeddings as they are."""
    lora: Lora | None = None
    """Options of LoRA; None trains all weights."""
    revision: str | None = None
    """Branch, tag or commit of the draft on the hub; None for the default branch."""
    dtype: str = "float32"
    """Data type of the weights. "auto" keeps the data type of a loaded model, and gives new weights float32."""
    attn_implementation: str | None = None
    """Implementation of attention, by its name in transformers; None for transformers' own choice."""
    trust_remote_code: bool = False
    """Whether code from the model's repository may run."""
    seed: int = 0
    """Seed of new weights: those of a new model, and those of LoRA updates."""

    def __post_init__(self) -> None:
        if self.draft is None and not self.config:
            raise ValueError("draft must be given, got none; add --draft, or --draft_config for random weights")
        if self.config and self.layers is not None:
            raise ValueError(
                f"draft_layers must be used without draft_config, got draft_layers={self.layers} with draft_config; "
                "omit --draft_layers, and add num_hidden_layers=N to --draft_config"
            )
        size = self.pad_vocab_size
        if size is not None and size != LIKE_TARGET and not size.isdecimal():
            raise ValueError(
                f"pad_vocab_size must be a number or {LIKE_TARGET!r}, got pad_vocab_size={size}; give one of these"
            )

    def model(self, name: str) -> ModelSource:
        """Returns a `ModelSource` for a model of the given name. Its other fields are those of the draft."""
        return ModelSource(
            name=name,
            revision=self.revision,
            dtype=self.dtype,
            attn_implementation=self.attn_implementation,
            trust_remote_code=self.trust_remote_code,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftPlan:
    """Plan of the draft: everything that is decided before weights are loaded."""

    source: DraftSource
    """Options that the plan was made from."""
    config: PreTrainedConfig
    """Configuration of the model that is loaded or initialised, before layers are cut and embeddings are padded."""
    tokenizer: PreTrainedTokenizerBase
    """Tokenizer of the draft; it is the same as the store's."""
    vocab_size: int
    """Size of the true vocabulary."""
    layers: tuple[int, ...] | None
    """Numbers of the layers to keep; None keeps all."""
    padded_vocab_size: int | None
    """Number of rows that the embeddings are padded to; None leaves the embeddings as they are."""
    num_parameters: int
    """Number of parameters, after layers are cut and before embeddings are padded; tied parameters count once."""
    notes: tuple[str, ...]
    """Warnings to print, one line each."""


def plan_draft(source: DraftSource, spec: StoreSpec) -> DraftPlan:
    """Decides how the draft will be made. Reads configurations and tokenizers, but no weights.

    Args:
        source: Options that say what the draft is made from.
        spec: Spec of the store that the draft will be trained on. If there are several stores, pass the spec with the
            largest `max_length`. `trainer.data.compatible.check_alike` checks that the stores fit each other.

    Raises:
        ValueError: The draft cannot be made, or does not fit the store.
    """
    made = spec.tokenizer
    if source.config:
        config, tokenizer = _new_config(source, spec)
    else:
        name = str(source.draft)
        _, tokenizer = check_model(source.model(name), what="draft", made=made, max_length=spec.max_length)
        config = load_config(source.model(name), what="draft")
    layers = None
    if source.layers is not None:
        layers = chosen_layers(source.layers, config.get_text_config().num_hidden_layers)
    parameters = check_buildable(
        config if layers is None else cut_config(config, layers),
        f"draft_config={' '.join(source.config)}" if source.config else f"draft={source.draft}",
        trust_remote_code=source.trust_remote_code,
    )
    padded = _padded_size(source, spec)
    notes = (context_note(config, spec), vocabulary_note(padded or config.get_text_config().vocab_size, spec))
    return DraftPlan(
        source=source,
        config=config,
        tokenizer=tokenizer,
        vocab_size=made.vocab_size,
        layers=layers,
        padded_vocab_size=padded,
        num_parameters=parameters,
        notes=tuple(note for note in notes if note is not None),
    )


def make_draft(plan: DraftPlan) -> PreTrainedModel:
    """Makes the draft on the CPU.

    Args:
        plan: Plan from `plan_draft`.

    Raises:
        ValueError: The weights cannot be read or are float16, the layers cannot be cut, the embeddings cannot be
            padded, the head cannot be separated from the backbone, or the draft has no layers that LoRA can adapt.
    """
    source = plan.source
    draft = _initialised(plan) if source.config else _loaded(source)
    if draft.dtype == torch.float16:
        raise ValueError(
            f"dtype must be float32 or bfloat16 to train in, got dtype={source.dtype}, which gives the draft float16 "
            "weights; add --dtype float32"
        )
    if plan.layers is not None:
        draft = cut_layers(draft, plan.layers, trust_remote_code=source.trust_remote_code)
    if plan.padded_vocab_size is not None:
        pad_vocabulary(draft, plan.padded_vocab_size, plan.vocab_size)
    check_halves(SplitLM(draft, plan.vocab_size))
    if source.lora is not None:
        add_lora(draft, source.lora, source.seed)
    return draft


def context_note(config: PreTrainedConfig, spec: StoreSpec) -> str | None:
    """Returns a warning if the draft's maximum sequence length is below that of the target, else None.

    The result is also None if the store has no target, or if the target's configuration cannot be loaded.

    Args:
        config: Configuration of the draft.
        spec: Spec of the store.
    """
    if spec.target is None:
        return None
    name = spec.target.model.name
    try:
        target = load_config(ModelSource(name=name), what="target")
    except ValueError:
        # Training does not need the target, so a target that cannot be reached is no reason to stop.
        return None
    own, other = (getattr(one.get_text_config(), "max_position_embeddings", None) for one in (config, target))
    if own is None or other is None or own >= other:
        return None
    text = config.get_text_config()
    # Rotary positions are computed, so they have no limit. Learned positions are rows of a table of fixed size.
    rotary = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)
    remedy = (
        f"the draft's positions are rotary, so with max_position_embeddings={other} in its config.json it can draft "
        "beyond that length, but less accurately"
        if rotary
        else "the draft's positions are not rotary, and probably cannot be extended"
    )
    return (
        f"the draft's max_position_embeddings is {own}, but that of the target ({name}) is {other}: after {own} "
        f"tokens, servers may stop drafting, or end the request; {remedy}"
    )


def vocabulary_note(num_embeddings: int, spec: StoreSpec) -> str | None:
    """Returns a warning if the embeddings of the draft and the target differ in their number of rows, else None.

    vLLM does not accept such a draft.

    Args:
        num_embeddings: Number of rows of the draft's embeddings.
        spec: Spec of the store.
    """
    if spec.target is None or num_embeddings == spec.target.model.padded_vocab_size:
        return None
    return (
        f"the draft's vocab_size is {num_embeddings}, but the target's is {spec.target.model.padded_vocab_size}: vLLM "
        f"needs equal sizes; if the target's vocab_size is larger, --pad_vocab_size {LIKE_TARGET} pads the draft's"
    )


def _new_config(source: DraftSource, spec: StoreSpec) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """Returns the configuration of a draft with random weights, and its tokenizer, which equals the store's.

    Raises:
        ValueError: No configuration is named, the tokenizer is not the store's, or the configuration does not fit the
            store.
    """
    base, settings = read_settings(source.config)
    target = None if spec.target is None else spec.target.model.name
    name = base or source.draft or target
    if name is None:
        raise ValueError(
            "draft_config must name a file or a model, got key=value pairs alone; add a file or a model, or --draft"
        )
    trusted = source.trust_remote_code
    # The revision belongs to the draft's repository, so it is not used for any other repository.
    config = base_config(name, revision=source.revision if name == source.draft else None, trust_remote_code=trusted)
    own = source.model(source.draft or spec.tokenizer.name)
    tokenizer = load_tokenizer(own if source.draft else replace(own, revision=None), what="tokenizer")
    found = tokenizer_spec(tokenizer, uses_chat_template=False)
    if found.fingerprint != spec.tokenizer.fingerprint:
        raise ValueError(
            f"tokenizer must be the store's, got {tokenizer.name_or_path}, which differs ({found.vocab_size} tokens, "
            f"{found.fingerprint[:19]}); name a model of the target's family as --draft"
        )
    config = with_tokens_of(changed(config, settings), tokenizer, spec.tokenizer.vocab_size, settings)
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and context < spec.max_length:
        raise ValueError(
            f"max_position_embeddings must be at least the {spec.max_length} tokens of the store's documents, got "
            f"max_position_embeddings={context}; add max_position_embeddings={spec.max_length} to --draft_config"
        )
    return config, tokenizer


def _padded_size(source: DraftSource, spec: StoreSpec) -> int | None:
    """Returns the number of rows that the embeddings are padded to; None leaves the embeddings as they are.

    Raises:
        ValueError: The number is smaller than the true vocabulary. Or the option is "target", and the store
            has no target.
    """
    given, least = source.pad_vocab_size, spec.tokenizer.vocab_size
    if given is None:
        return None
    if given == LIKE_TARGET:
        if spec.target is None:
            raise ValueError(
                f"pad_vocab_size must be a number where the store has no target, got pad_vocab_size={given}; give a "
                "number, or omit it"
            )
        return spec.target.model.padded_vocab_size
    if int(given) < least:
        raise ValueError(
            f"pad_vocab_size must be at least the vocabulary size {least}, got pad_vocab_size={given}; "
            f"give {least}, or {LIKE_TARGET!r}"
        )
    return int(given)


def _loaded(source: DraftSource) -> PreTrainedModel:
    """Loads the model that the draft is made from, on the CPU."""
    return load_model(source.model(str(source.draft)), what="draft", device="cpu")


def _initialised(plan: DraftPlan) -> PreTrainedModel:
    """Makes a model with random weights, initialised as its architecture defines.

    Raises:
        ValueError: The model cannot be made, or cannot run with the chosen implementation of attention.
    """
    source = plan.source
    # The seed is set inside a fork, so that drawing the weights does not change the caller's random numbers.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(source.seed)
        try:
            draft: PreTrainedModel = AutoModelForCausalLM.from_config(
                plan.config,
                dtype=torch.float32 if source.dtype == "auto" else getattr(torch, source.dtype),
                attn_implementation=source.attn_implementation,
                trust_remote_code=source.trust_remote_code,
            )
            # Some configurations and implementations of attention fail only when the model runs.
            draft.eval()
            with torch.no_grad():
                draft(input_ids=torch.zeros((1, 2), dtype=torch.int64), use_cache=False)
        except (ImportError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"draft_config must make a model that runs, got {' '.join(source.config)} with attn_implementation="
                f"{source.attn_implementation} ({' '.join(str(error).split())[:200]}); change one of them"
            ) from error
    return draft
