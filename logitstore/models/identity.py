"""The identity of a model and of a tokenizer: digests of their files, and whether two can work together."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from logitstore.format.spec import ModelSpec, TokenizerSpec
from logitstore.models.loading import load_config, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from logitstore.models.loading import ModelSource


WEIGHTS = frozenset({".safetensors", ".bin"})
"""How the files of weights end."""


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
    source: ModelSource, *, what: str, made: TokenizerSpec, max_length: int | None, weights: bool = True
) -> tuple[ModelSpec, PreTrainedTokenizerBase]:
    """Checks that a model fits documents, by its configuration, tokenizer and weight files; does not load it.

    Args:
        source: The model.
        what: Its part, for the messages: target, draft, reference NAME.
        made: The tokenizer that made the documents.
        max_length: Most tokens of a document; None where there are none.
        weights: Whether it must have weights that can be read, if it is a folder; without, they are not looked at.

    Returns:
        Its description, and its own tokenizer.

    Raises:
        ValueError: It has another tokenizer, too small a vocabulary or context, or no weights.
    """
    name = source.name
    config, tokenizer = load_config(source, what=what), load_tokenizer(source, what=what)
    found = tokenizer_spec(tokenizer, uses_chat_template=False)
    if found.fingerprint != made.fingerprint:
        raise ValueError(
            f"{what} must have the tokenizer of {made.name} ({made.vocab_size} tokens, {made.fingerprint[:19]}), got "
            f"{what}={name} with another ({found.vocab_size} tokens, {found.fingerprint[:19]}); give a model of the "
            "same family"
        )
    try:
        spec = model_spec(name, config, source.dtype, weights=weights)
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
