"""Where the draft to train comes from: a model as it is, cut from a larger one, or made anew; padded, adapted.

`plan_draft` decides and refuses, before any weights are read; `make_draft` does it. The other half of the work is in
`trainer.drafts.configs`, `trainer.drafts.reshaping` and `trainer.drafts.lora`.
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
"""The padded vocabulary size that is the target's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftSource:
    """What was asked for."""

    draft: str | None = None
    """Hugging Face id or folder: the model to begin with; with `config`, whose configuration and tokenizer to take."""
    config: tuple[str, ...] = ()
    """The draft is made anew, with random weights: a JSON file, folder or id, and key=value pairs that change it."""
    layers: str | None = None
    """Cut these layers, "0,9,18,27", or so many, "4", from `draft`."""
    pad_vocab_size: str | None = None
    """Rows of the embeddings: a number, or "target"."""
    lora: Lora | None = None
    revision: str | None = None
    """Branch, tag or commit of the hub."""
    dtype: str = "float32"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    seed: int = 0
    """Of weights that are made."""

    def __post_init__(self) -> None:
        if self.draft is None and not self.config:
            raise ValueError("draft must be given, got none; add --draft, or --draft_config for one made anew")
        if self.config and self.layers is not None:
            raise ValueError(
                f"draft_layers must be left out with draft_config, got draft_layers={self.layers}; a draft made anew "
                "has num_hidden_layers"
            )
        size = self.pad_vocab_size
        if size is not None and size != LIKE_TARGET and not size.isdecimal():
            raise ValueError(
                f"pad_vocab_size must be a number or {LIKE_TARGET!r}, got pad_vocab_size={size}; change it"
            )

    def model(self, name: str) -> ModelSource:
        """Returns how to load a model of some name, with the options given for the draft."""
        return ModelSource(
            name=name,
            revision=self.revision,
            dtype=self.dtype,
            attn_implementation=self.attn_implementation,
            trust_remote_code=self.trust_remote_code,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftPlan:
    """What will be made."""

    source: DraftSource
    config: PreTrainedConfig
    """Of the model that is loaded or made anew, before anything is cut or padded."""
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    """The true vocabulary."""
    layers: tuple[int, ...] | None
    padded_vocab_size: int | None
    """None leaves the embeddings as they are."""
    num_parameters: int
    """Of the draft, before anything is padded; tied ones count once."""
    notes: tuple[str, ...]
    """Lines to print: what may surprise later."""


def plan_draft(source: DraftSource, spec: StoreSpec) -> DraftPlan:
    """Decides what the draft will be, from configurations and tokenizers alone.

    Args:
        source: What was asked for.
        spec: Of the store that it will be trained on; of several that agree, any.

    Raises:
        ValueError: It cannot be made, or does not fit the store.
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
    """Makes the draft, on the CPU.

    Raises:
        ValueError: Weights cannot be read, its head cannot be taken apart from its backbone, its layers cannot be
            cut, or there is nothing to adapt.
    """
    source = plan.source
    draft = _initialised(plan) if source.config else _loaded(source)
    if draft.dtype == torch.float16:
        raise ValueError(
            f"dtype must be float32 or bfloat16 to train in, got dtype={source.dtype}, and weights in float16 in "
            f"{source.draft}; add --dtype float32"
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
    """Says so if the draft's context is shorter than the target's; None too where the target is not to be found."""
    if spec.target is None:
        return None
    name = spec.target.model.name
    try:
        target = load_config(ModelSource(name=name), what="target")
    except ValueError:
        return None
    own, other = (getattr(one.get_text_config(), "max_position_embeddings", None) for one in (config, target))
    if own is None or other is None or own >= other:
        return None
    text = config.get_text_config()
    rotary = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)
    remedy = (
        f"its positions are rotary: with {other} in its config.json it drafts further, if less well"
        if rotary
        else "its positions are learned, and there are no more"
    )
    return (
        f"the draft's max_position_embeddings is {own}, the target's ({name}) {other}: servers may stop drafting, or "
        f"the whole request, after {own} tokens; {remedy}"
    )


def vocabulary_note(num_embeddings: int, spec: StoreSpec) -> str | None:
    """Says so if the draft's embeddings have other rows than the target's: vLLM takes no such draft."""
    if spec.target is None or num_embeddings == spec.target.model.padded_vocab_size:
        return None
    return (
        f"the draft's vocab_size is {num_embeddings}, the target's {spec.target.model.padded_vocab_size}: vLLM wants "
        f"them equal; --pad_vocab_size {LIKE_TARGET} makes them so where the target's is larger"
    )


def _new_config(source: DraftSource, spec: StoreSpec) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """The configuration of a draft that is made anew, and the store's tokenizer."""
    base, settings = read_settings(source.config)
    target = None if spec.target is None else spec.target.model.name
    name = base or source.draft or target
    if name is None:
        raise ValueError("draft_config must name a file or a model, got key=value pairs alone; add one, or --draft")
    trusted = source.trust_remote_code
    config = base_config(name, revision=source.revision if name == source.draft else None, trust_remote_code=trusted)
    own = source.model(source.draft or spec.tokenizer.name)
    tokenizer = load_tokenizer(own if source.draft else replace(own, revision=None), what="tokenizer")
    found = tokenizer_spec(tokenizer, uses_chat_template=False)
    if found.fingerprint != spec.tokenizer.fingerprint:
        raise ValueError(
            f"tokenizer must be the store's, got {tokenizer.name_or_path} with another ({found.vocab_size} tokens, "
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
    """The rows that the embeddings are to have."""
    given, least = source.pad_vocab_size, spec.tokenizer.vocab_size
    if given is None:
        return None
    if given == LIKE_TARGET:
        if spec.target is None:
            raise ValueError(
                f"pad_vocab_size must be a number where the store has no target, got pad_vocab_size={given}; change it"
            )
        return spec.target.model.padded_vocab_size
    if int(given) < least:
        raise ValueError(
            f"pad_vocab_size must be at least the vocabulary's {least}, got pad_vocab_size={given}; "
            f"give more, or {LIKE_TARGET!r}"
        )
    return int(given)


def _loaded(source: DraftSource) -> PreTrainedModel:
    return load_model(source.model(str(source.draft)), what="draft", device="cpu")


def _initialised(plan: DraftPlan) -> PreTrainedModel:
    """A model with random weights, as its architecture draws them."""
    source = plan.source
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(source.seed)
        try:
            draft: PreTrainedModel = AutoModelForCausalLM.from_config(
                plan.config,
                dtype=torch.float32 if source.dtype == "auto" else getattr(torch, source.dtype),
                attn_implementation=source.attn_implementation,
                trust_remote_code=source.trust_remote_code,
            )
            draft.eval()
            with torch.no_grad():
                draft(input_ids=torch.zeros((1, 2), dtype=torch.int64), use_cache=False)
        except (ImportError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"draft_config must make a model that runs, got {' '.join(source.config)} with attn_implementation="
                f"{source.attn_implementation} ({' '.join(str(error).split())[:200]}); change them"
            ) from error
    return draft
