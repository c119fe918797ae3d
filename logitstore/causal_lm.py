"""A Hugging Face causal LM as a backbone and a head: the torch code that the dump and the trainer share.

Not imported by `import logitstore`. N rows, V true vocabulary, H hidden size, B batch, T tokens.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.generic import is_flash_attention_requested

from logitstore.format.spec import ModelSpec, TokenizerSpec
from logitstore.split_checks import check_halves, check_packing

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

LOGITS_PER_CHUNK = {"cpu": 2**21, "cuda": 2**26}
"""Logits of one chunk of rows: 8 MiB in float32, which a CPU's cache nearly holds; 256 MiB keep a GPU busy."""


SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""What configurations call the soft cap of logits: Gemma's, RecurrentGemma's, xLSTM's name."""

WEIGHTS = frozenset({".safetensors", ".bin"})
"""How the files of weights end."""


class SplitLM:
    """A causal LM in two halves, so that the head runs on chosen rows alone.

    Attributes:
        model: The whole model.
        vocab_size: The true vocabulary V; logits beyond it, of padding rows of the embedding, never come out.
        scale: What the head's output is multiplied by.
        softcap: Then logits are softcap * tanh(logits / softcap), unless it is None.
    """

    def __init__(self, model: PreTrainedModel, vocab_size: int) -> None:
        self.model = model
        self.vocab_size = vocab_size
        config = model.config.get_text_config()
        self.scale = _logit_scale(config)
        self.softcap = next((cap for name in SOFTCAPS if (cap := getattr(config, name, None))), None)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    @property
    def rows_per_chunk(self) -> int:
        """Rows whose logits are made at once; a matrix product of fewer than 64 wastes its reading of the head."""
        return max(64, LOGITS_PER_CHUNK.get(self.device.type, 2**26) // self.vocab_size)

    @property
    def backbone(self) -> torch.nn.Module:
        """All but the head."""
        base: torch.nn.Module = self.model.base_model
        # the text half of a larger model: transformers looks for it under the name that the larger one has it under
        return getattr(base, "model", base) if base is self.model else base

    @property
    def head(self) -> torch.nn.Linear:
        """The output embedding."""
        head: torch.nn.Linear = self.model.get_output_embeddings()
        return head

    def hidden(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Runs the backbone.

        Args:
            input_ids: Int64 [B, T], right-padded. No mask is needed: attention is causal, so that nothing after a
                token reaches it.
            position_ids: Int64 [B, T], from 0 at each document of a row that holds several: none attends to another
                then. Only for models that pass `check_packing`.

        Returns:
            [B, T, H], after the last norm, in the head's dtype: some state-space models compute in float32 till then.
        """
        shape = input_ids.shape
        if position_ids is None:
            output = self.backbone(input_ids=input_ids, use_cache=False)
        else:
            if is_flash_attention_requested(self.model.config.get_text_config()):
                # it sees where documents begin in a batch of one row alone
                input_ids, position_ids = input_ids.reshape(1, -1), position_ids.reshape(1, -1)
            output = self.backbone(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        hidden: Tensor = output.last_hidden_state
        return hidden.reshape(*shape, -1).to(self.head.weight.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """Runs the head.

        Args:
            hidden: [N, H].

        Returns:
            Float32 [N, V].
        """
        logits: Tensor = self.head(hidden)[:, : self.vocab_size].float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def check(self) -> None:
        """Compares the two halves with the model as a whole, on a few tokens.

        Raises:
            ValueError: The model does something else between its backbone and its logits, or is not causal.
        """
        check_halves(self)

    def check_packing(self) -> None:
        """Compares documents packed into one row with the same ones elsewhere, on the device that the model is on.

        Raises:
            ValueError: What a document gives depends on what it is packed with, or on where.
        """
        check_packing(self)


def _logit_scale(config: PreTrainedConfig) -> float:
    """What a model multiplies its head's output by; a power of the width, in maximal update parametrisation."""
    factors = ["logit_scale", "lm_head_multiplier"]
    divisors = ["logits_scaling", "logits_mup_width_multiplier"]
    if config.model_type == "hyperclovax":  # the same name as Granite's, used the other way round
        factors, divisors = [*factors, "logits_scaling"], ["logits_mup_width_multiplier"]
    scale = math.prod(getattr(config, name, None) or 1.0 for name in factors)
    return scale / math.prod(getattr(config, name, None) or 1.0 for name in divisors)


def load_config(name: str, *, what: str, revision: str | None, trust_remote_code: bool) -> PreTrainedConfig:
    """Reads a model's configuration, without its weights.

    Args:
        name: Hugging Face id or folder.
        what: Its part, for the message: target, draft, reference NAME.
        revision: Branch, tag or commit of the hub.
        trust_remote_code: Whether code from its repository may run.

    Raises:
        ValueError: There is no such model, or it is not a causal LM's configuration.
    """
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        rule = "be a Hugging Face id or a folder with a config.json"
        raise _refusal(what, rule, name, error, "save the model there") from error
    return config


def load_tokenizer(name: str, *, what: str, revision: str | None, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Loads a tokenizer.

    Args:
        name: Hugging Face id or folder.
        what: What was named, for the message: tokenizer, or the part of the model whose own it is.
        revision: Branch, tag or commit of the hub.
        trust_remote_code: Whether code from its repository may run.

    Raises:
        ValueError: There is none.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        rule = "be a Hugging Face id or a folder with tokenizer files" if what == "tokenizer" else "have a tokenizer"
        raise _refusal(what, rule, name, error, "save one there") from error
    return tokenizer


def load_model(
    name: str,
    *,
    revision: str | None,
    dtype: str,
    attn_implementation: str | None,
    trust_remote_code: bool,
    device: torch.device | str,
) -> PreTrainedModel:
    """Loads a causal LM for inference."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        name,
        revision=revision,
        dtype=dtype,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
    )
    model.eval()
    model.to(device)  # type: ignore[arg-type]  # transformers types its wrapper wrongly
    return model


def model_spec(name: str, config: PreTrainedConfig, dtype: str, *, weights: bool = True) -> ModelSpec:
    """Describes a model without loading it.

    Args:
        name: As given by the user.
        config: Its configuration.
        dtype: What it will run in; "auto" takes the configuration's.
        weights: Whether the ends of a folder's weight files are read, to tell its revision; "unknown" otherwise.

    Raises:
        OSError: They cannot be read.
    """
    text = config.get_text_config()
    if dtype == "auto":
        stated = getattr(config, "dtype", None) or getattr(text, "dtype", None) or "float32"
        dtype = str(stated).removeprefix("torch.")
    revision = _revision(name, config, weights)
    return ModelSpec(name=name, revision=revision, dtype=dtype, padded_vocab_size=int(text.vocab_size))


def _weight_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in WEIGHTS and path.is_file())


def _revision(name: str, config: PreTrainedConfig, weights: bool) -> str:
    """The hub's commit; for a folder with weights a digest of its configuration and of the ends of its weight files.

    The first MiB of a file holds the names, shapes and first weights: enough to tell two trainings of one
    architecture apart, and quick for a terabyte of weights.
    """
    folder = Path(name)
    if not folder.is_dir() or not weights:
        return str(getattr(config, "_commit_hash", None) or "unknown")
    sha = hashlib.sha256((folder / "config.json").read_bytes())
    for path in _weight_files(folder):
        size = path.stat().st_size
        sha.update(f"{path.name}:{size};".encode())
        with path.open("rb") as file:
            sha.update(file.read(2**20))
            file.seek(max(0, size - 2**20))
            sha.update(file.read(2**20))
    return f"sha256:{sha.hexdigest()}"


def tokenizer_spec(tokenizer: PreTrainedTokenizerBase, *, uses_chat_template: bool) -> TokenizerSpec:
    """Describes a tokenizer by what it does, not where it lies."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    merges: list[Any] = []
    if tokenizer.is_fast:
        merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"].get("merges", [])
    joined = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    template = tokenizer.chat_template if uses_chat_template else None
    return TokenizerSpec(
        name=tokenizer.name_or_path,
        fingerprint=_sha256(json.dumps([vocabulary, joined])),
        vocab_size=vocabulary[-1][1] + 1,
        chat_template=None if template is None else _sha256(json.dumps(template, sort_keys=True)),
    )


def check_model(
    name: str,
    *,
    what: str,
    made: TokenizerSpec,
    max_length: int | None,
    revision: str | None,
    dtype: str,
    trust_remote_code: bool,
    weights: bool = True,
) -> tuple[ModelSpec, PreTrainedTokenizerBase]:
    """Checks that a model fits documents, by its configuration, tokenizer and weight files; does not load it.

    Args:
        name: Hugging Face id or folder.
        what: Its part, for the messages: target, draft, reference NAME.
        made: The tokenizer that made the documents.
        max_length: Most tokens of a document; None where there are none.
        revision: Branch, tag or commit of the hub.
        dtype: What it will run in; "auto" takes the configuration's.
        trust_remote_code: Whether code from its repository may run.
        weights: Whether it must have weights that can be read, if it is a folder; without, they are not looked at.

    Returns:
        Its description, and its own tokenizer.

    Raises:
        ValueError: It has another tokenizer, too small a vocabulary or context, or no weights.
    """
    config = load_config(name, what=what, revision=revision, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(name, what=what, revision=revision, trust_remote_code=trust_remote_code)
    found = tokenizer_spec(tokenizer, uses_chat_template=False)
    if found.fingerprint != made.fingerprint:
        raise ValueError(
            f"{what} must have the tokenizer of {made.name} ({made.vocab_size} tokens, {made.fingerprint[:19]}), got "
            f"{what}={name} with another ({found.vocab_size} tokens, {found.fingerprint[:19]}); give a model of the "
            "same family"
        )
    try:
        spec = model_spec(name, config, dtype, weights=weights)
    except OSError as error:
        raise ValueError(
            f"{what} must have weights that can be read, got {what}={name} ({error}); see that they may be read, or "
            "copy or download it again"
        ) from error
    check_vocabulary(spec, made, what)
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if max_length is not None and context is not None and max_length > context:
        raise ValueError(
            f"max_length must be at most {context}, the context of {what}={name}, got max_length={max_length}; give "
            "a smaller --max_length to the dump"
        )
    folder = Path(name)
    if weights and folder.is_dir() and not _weight_files(folder):
        raise ValueError(f"{what} must have weights, got {what}={name} without a .safetensors file; save them there")
    return spec, tokenizer


def check_vocabulary(spec: ModelSpec, tokenizer: TokenizerSpec, what: str) -> None:
    """Raises ValueError if a model has fewer output rows than the tokenizer has tokens."""
    if spec.padded_vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"{what} must have a vocabulary of at least {tokenizer.vocab_size} as the tokenizer {tokenizer.name}, got "
            f"vocab_size={spec.padded_vocab_size} of {spec.name}; give a model of the same family"
        )


def _sha256(text: str) -> str:
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _refusal(what: str, rule: str, name: str, error: Exception, mend: str) -> ValueError:
    """What to raise where nothing can be loaded; `mend` is what to do with a folder."""
    said = str(error).strip().partition("\n")[0].strip()
    # Of a list of causes, the first line is but the start.
    reason = "" if said.endswith(":") else f" ({said.rstrip('.')})"
    if not Path(name).is_dir():
        mend = "check the name: it is no folder here, and the hub did not give it"
    return ValueError(f"{what} must {rule}, got {what}={name}{reason}; {mend}")
