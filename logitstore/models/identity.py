"""The identity of models and tokenizers: digests of their contents, and checks that they fit together."""

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
"""Suffixes of weight files."""


def model_spec(name: str, config: PreTrainedConfig, dtype: str, *, weights: bool = True) -> ModelSpec:
    """Returns the description of a model (name, revision, data type, vocabulary size) without loading it.

    Args:
        name: Hugging Face id or folder, as the user gave it.
        config: The model's configuration.
        dtype: Data type that the model will run in; "auto" for the data type in the configuration.
        weights: Whether to read the weight files of a folder to compute the revision. If False, the revision of a
            folder is "unknown". For a model from the hub, the revision is its commit in both cases.

    Raises:
        OSError: The configuration file or the weight files of the folder cannot be read.
    """
    # A multimodal model keeps the values of its text model in a part of its configuration.
    text = config.get_text_config()
    if dtype == "auto":
        stated = getattr(config, "dtype", None) or getattr(text, "dtype", None) or "float32"
        dtype = str(stated).removeprefix("torch.")
    revision = _revision(name, config, weights)
    return ModelSpec(name=name, revision=revision, dtype=dtype, padded_vocab_size=int(text.vocab_size))


def _weight_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in WEIGHTS and path.is_file())


def _revision(name: str, config: PreTrainedConfig, weights: bool) -> str:
    """Returns the revision of a model: its commit on the hub or, for a folder, a digest of its files.

    The digest covers config.json, and the name, the size, and the first and last MiB of each weight file. The first MiB
    holds the names and shapes of the tensors, and the first weights. The digested bytes differ between two trainings of
    one architecture, and reading them is quick even for a terabyte of weights.

    Returns:
        The revision; "unknown" for a model of the hub without a known commit, or for a folder if `weights` is False.
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
    """Returns the description of a tokenizer. Its fingerprint covers the vocabulary and the merges, not the files.

    Args:
        tokenizer: The tokenizer.
        uses_chat_template: Whether the documents are rendered with the chat template, which is then part of the
            description.
    """
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    # Merges are included, because tokenizers with the same vocabulary but other merges split text differently.
    merges: list[Any] = []
    if tokenizer.is_fast:
        merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"].get("merges", [])
    # Versions of the tokenizers package write a merge either as one string or as a pair.
    joined = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    template = tokenizer.chat_template if uses_chat_template else None
    return TokenizerSpec(
        name=tokenizer.name_or_path,
        fingerprint=_sha256(json.dumps([vocabulary, joined])),
        vocab_size=vocabulary[-1][1] + 1,  # The largest id decides, because ids may have gaps.
        chat_template=None if template is None else _sha256(json.dumps(template, sort_keys=True)),
    )


def check_model(
    source: ModelSource, *, what: str, made: TokenizerSpec, max_length: int | None, weights: bool = True
) -> tuple[ModelSpec, PreTrainedTokenizerBase]:
    """Checks that a model fits the documents, without loading it.

    Reads only the model's configuration, its tokenizer and, if `weights` is set, parts of its weight files.

    Args:
        source: The model.
        what: Role of the model in error messages: target, draft, reference NAME.
        made: The tokenizer with which the documents were tokenised.
        max_length: Largest number of tokens in a document. If None, the length of the model's context is not checked.
        weights: Whether a model in a folder must have readable weights. If False, its weight files are not read.

    Returns:
        The model's description, and the model's own tokenizer.

    Raises:
        ValueError: The model's tokenizer differs from `made`, the model's vocabulary or context is too small, or its
            configuration, tokenizer or weights cannot be read.
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
            f"{what} must have weights that can be read, got {what}={name} ({error}); check that its files are "
            "readable, or copy or download it again"
        ) from error
    check_vocabulary(spec, made, what)
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if max_length is not None and context is not None and max_length > context:
        raise ValueError(
            f"max_length must be at most {context}, the context of {what}={name}, got max_length={max_length}; "
            f"make the store with --max_length {context}"
        )
    folder = Path(name)
    if weights and folder.is_dir() and not _weight_files(folder):
        raise ValueError(
            f"{what} must have weights, got {what}={name} without a .safetensors file; save the weights in that folder"
        )
    return spec, tokenizer


def check_vocabulary(spec: ModelSpec, tokenizer: TokenizerSpec, what: str) -> None:
    """Checks that a model's output embedding has a row for each token of the tokenizer.

    Args:
        spec: The model.
        tokenizer: The tokenizer with which the documents were tokenised.
        what: Role of the model in error messages: target, draft, reference NAME.

    Raises:
        ValueError: The model has fewer output rows than the tokenizer has tokens.
    """
    # More output rows than tokens are fine: many models pad their output embedding.
    if spec.padded_vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"{what} must have a vocabulary of at least {tokenizer.vocab_size}, the size of the tokenizer "
            f"{tokenizer.name}, got vocab_size={spec.padded_vocab_size} of {spec.name}; give a model of the same family"
        )


def _sha256(text: str) -> str:
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
