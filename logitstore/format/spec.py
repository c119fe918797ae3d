"""What a store holds, from what, and how: the metadata kept as JSON in the groups' attributes.

`StoreSpec` is in the attributes of the root group and says what the tokens are; `TargetSpec` and `LossSpec` are in the
attributes of their layers. Never credentials, never storage options.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from logitstore.errors import FormatError, IdentityError
from logitstore.format.codebook import LEVELS, Codebook
from logitstore.format.schemes import Scheme

FORMAT_VERSION = 1
ROW_CHUNK = 2**14
"""Rows in one inner chunk of a per-row array."""
MAX_SHARDS = 2**24
MAX_SHARD_ROWS = 2**24
MAX_SHARD_ENTRIES = 2**26
"""What a store may ask of the memory of a reader: some 2.5 GB for decoding the entries of a shard at the very most."""

ELSEWHERE = ("target", "losses", "appends")
"""Fields of an opened store's spec that are not in the root's attributes."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class TokenizerSpec:
    """Which tokenizer made the token ids."""

    name: str
    """Where it was loaded from; informational."""
    fingerprint: str
    """sha256 of its vocabulary and merges."""
    vocab_size: int
    """The true vocabulary: largest token id + 1. Models may pad theirs beyond it."""
    chat_template: str | None
    """sha256 of the chat template where one was used."""


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Which documents the tokens are."""

    source: str
    """Path, URL or hf: name as given, without credentials."""
    digest: str | None
    """sha256 over names, sizes and change marks of the files; None where the source has none (hf: names)."""
    columns: Literal["text", "prompt_response", "messages", "input_ids"]
    """Which columns the documents were made from."""
    mask_policy: Literal["all", "response", "given"]
    """Which predictions count: all of a text, those of response tokens, or what a loss_mask column says."""
    documents: str | None = None
    """sha256 over the digests of the tokens' shards, in order: the documents themselves, whatever file holds them."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Which model computed a layer."""

    name: str
    """Hugging Face id or folder; informational."""
    revision: str
    """Commit of the hub, or a digest of the folder's configuration and weights."""
    dtype: str
    """What it ran in, such as bfloat16."""
    padded_vocab_size: int
    """Rows of its output embedding; those beyond the tokenizer's vocabulary never enter."""


@dataclass(frozen=True, kw_only=True)
class TargetSpec:
    """The `target` layer: the model, the truncation, the codes."""

    model: ModelSpec
    scheme: Scheme
    codebook: Codebook = field(default_factory=Codebook)
    temperature: float = 1.0
    """Logprobs are normalised at this temperature; always 1 in this format version."""

    @property
    def room(self) -> int:
        """Most entries that a row can have."""
        if self.scheme.name == "hybrid":
            return int(1 / self.step) + 1
        return self.scheme.num_draws if self.scheme.draws else self.scheme.k

    @property
    def step(self) -> float:
        """What one draw stands for: the probability from which on hybrid keeps an entry for itself.

        A little below 1 / num_draws, where a code of the codebook ends: the codes alone tell drawn entries from others.
        """
        if self.scheme.name != "hybrid":
            return 1 / self.scheme.num_draws
        return self.codebook.lower_end(self.last_exact_code)

    @property
    def last_exact_code(self) -> int:
        """The last code of entries that stand for themselves."""
        return self.codebook.code_at(1 / self.scheme.num_draws) if self.scheme.name == "hybrid" else LEVELS - 1

    def __post_init__(self) -> None:
        if self.temperature != 1.0:
            raise ValueError(f"temperature must be 1, got temperature={self.temperature}; this version stores no other")
        if self.scheme.name == "hybrid" and self.last_exact_code == LEVELS - 1:
            raise ValueError(
                f"num_draws must be fewer with exponent={self.codebook.exponent}, whose last code reaches up to "
                f"1 / num_draws, got num_draws={self.scheme.num_draws}; the exponent 4 is usual"
            )


@dataclass(frozen=True, kw_only=True)
class LossSpec:
    """A `losses/<name>` layer: the model whose losses it holds."""

    model: ModelSpec


@dataclass(frozen=True, kw_only=True)
class Append:
    """Documents that were added to a finished store, as shards of their own."""

    data: DataSpec
    first_shard: int
    num_shards: int

    def __post_init__(self) -> None:
        if not 1 <= self.num_shards <= MAX_SHARDS or not 1 <= self.first_shard <= MAX_SHARDS:
            raise ValueError(
                f"shards must be 1 to {MAX_SHARDS}, got first_shard={self.first_shard}, num_shards={self.num_shards}"
            )


@dataclass(frozen=True, kw_only=True)
class StoreSpec:
    """Everything needed to refuse a store's misuse."""

    tokenizer: TokenizerSpec
    data: DataSpec
    max_length: int
    """Most tokens of a document; longer ones were split into windows."""
    shard_rows: int = 2**18
    """Most rows of a shard. Above 2**14 a multiple of it."""
    num_shards: int
    """Shards that the documents fill; in an opened store, with those that were appended."""
    format_version: int = FORMAT_VERSION
    target: TargetSpec | None = None
    """Not part of the root's attributes: read from the layer."""
    losses: dict[str, LossSpec] = field(default_factory=dict)
    """Likewise, by name."""
    appends: tuple[Append, ...] = ()
    """Likewise, from the records in appends/."""

    def __post_init__(self) -> None:
        if not 0 <= self.num_shards <= MAX_SHARDS:
            raise ValueError(
                f"num_shards must be at most {MAX_SHARDS}, got num_shards={self.num_shards}; give a larger --shard_rows"
            )
        if not 1 <= self.tokenizer.vocab_size <= 2**32:
            raise ValueError(f"vocab_size must be between 1 and 2**32, got vocab_size={self.tokenizer.vocab_size}")
        if self.shard_rows > MAX_SHARD_ROWS:
            raise ValueError(
                f"shard_rows must be at most {MAX_SHARD_ROWS}, got shard_rows={self.shard_rows}; 262144 is usual"
            )
        if self.max_length < 2:
            raise ValueError(f"max_length must be at least 2, got max_length={self.max_length}")
        if self.shard_rows < self.max_length:
            raise ValueError(
                f"shard_rows must be at least max_length={self.max_length} because documents are never split over "
                f"shards, got shard_rows={self.shard_rows}; give a larger --shard_rows or a smaller --max_length"
            )
        if self.shard_rows > ROW_CHUNK and self.shard_rows % ROW_CHUNK:
            raise ValueError(
                f"shard_rows must be a multiple of {ROW_CHUNK} when above it, got shard_rows={self.shard_rows}; "
                f"give {-(-self.shard_rows // ROW_CHUNK) * ROW_CHUNK}"
            )


def to_json(spec: StoreSpec | TargetSpec | LossSpec) -> dict[str, Any]:
    """Returns what is kept in the attributes of the spec's group."""
    values = dataclasses.asdict(spec)
    return {name: value for name, value in values.items() if name not in ELSEWHERE}


def check_room(shard_rows: int, room: int) -> None:
    """Raises ValueError if a shard could have more entries than a process should ever hold at once."""
    if shard_rows * room > MAX_SHARD_ENTRIES:
        raise ValueError(
            f"entries of a row must be at most {MAX_SHARD_ENTRIES // shard_rows} in shards of {shard_rows} rows, got "
            f"up to {room}; give a smaller --k or --num_draws, or a store of a smaller --shard_rows"
        )


def maker(spec: StoreSpec | TargetSpec | LossSpec) -> str:
    """Returns the digest of all that `check_same` compares: whose values a layer holds."""
    text = json.dumps(_identity(spec), sort_keys=True)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _identity(spec: object) -> object:
    if not dataclasses.is_dataclass(spec):
        return spec
    joined = ELSEWHERE if isinstance(spec, StoreSpec) else ()
    return {
        f.name: _identity(getattr(spec, f.name))
        for f in dataclasses.fields(spec)
        if f.name not in joined and (f.name not in INFORMATIONAL or isinstance(spec, Scheme))
    }


def from_json(cls: type[T], values: object, where: str) -> T:
    """Builds a spec from JSON values, checking every type: a store may come from anywhere.

    Args:
        cls: StoreSpec, TargetSpec, LossSpec or one of their parts.
        values: What the attributes hold.
        where: What to call it in a message.

    Raises:
        FormatError: Another format version, or fields that are missing, unknown or of the wrong type.
    """
    if not isinstance(values, dict):
        raise FormatError(f"{where} must be a JSON object, got {where}={values!r:.80}; this is no logitstore store")
    if cls is StoreSpec and (version := values.get("format_version")) != FORMAT_VERSION:
        raise FormatError(
            f"format_version must be {FORMAT_VERSION}, got format_version={version!r:.80}; "
            "open the store with the version of logitstore that wrote it"
        )
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if cls is StoreSpec:
        for name in ELSEWHERE:
            del fields[name]
    if unknown := sorted(set(values) - set(fields)):
        raise FormatError(f"{where} must have known fields only, got {unknown[0]!r:.80}; a newer version wrote it")
    converted = {}
    for name, f in fields.items():
        if name in values:
            converted[name] = _convert(hints[name], values[name], f"{where}.{name}")
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise FormatError(f"{where} must have a field {name!r}, got none; the metadata is incomplete")
    try:
        return cls(**converted)
    except ValueError as error:
        raise FormatError(f"{where} is malformed: {error}") from error


def _convert(hint: Any, value: object, where: str) -> Any:  # noqa: ANN401
    if dataclasses.is_dataclass(hint):
        return from_json(hint, value, where)  # type: ignore[arg-type]
    if isinstance(hint, types.UnionType):
        allowed = typing.get_args(hint)
        if value is None and type(None) in allowed:
            return None
        return _convert(allowed[0], value, where)
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            raise FormatError(f"{where} must be one of {list(typing.get_args(hint))}, got {where}={value!r:.80}")
        return value
    if hint is float and type(value) is int and abs(value) < 2**53:
        return float(value)
    if hint in (int, float, str) and type(value) is hint:
        return value
    raise FormatError(f"{where} must be of type {getattr(hint, '__name__', hint)}, got {where}={value!r:.80}")


INFORMATIONAL = frozenset({"name", "source", "digest", "documents", "num_shards"})
"""Fields that may differ between two specs of the same thing: where it lies, not what it is."""


def check_same(stored: object, given: object, what: str, next_step: str) -> None:
    """Compares two specs field by field, all but the informational ones.

    Raises:
        IdentityError: They differ; names the first field that does and both its values.
    """
    for f in dataclasses.fields(stored):  # type: ignore[arg-type]
        old, new = getattr(stored, f.name), getattr(given, f.name)
        if dataclasses.is_dataclass(old) and dataclasses.is_dataclass(new):
            check_same(old, new, f"{what}.{f.name}", next_step)
        elif old != new and (f.name not in INFORMATIONAL or isinstance(stored, Scheme)):
            raise IdentityError(f"{what}.{f.name} must be {old!r} as in the store, got {f.name}={new!r}; {next_step}")
