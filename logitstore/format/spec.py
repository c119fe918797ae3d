"""Specs: the metadata that identifies the content of a store, kept as JSON in the attributes of its Zarr groups.

The attributes of the root group hold a `StoreSpec`, which describes the tokens. The attributes of the `target` group
hold a `TargetSpec`, and those of each `losses/<name>` group hold a `LossSpec`. Specs never contain credentials or
storage options. Fields that are marked as informational are ignored when two specs are compared (`check_same`).
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
from logitstore.format.schemes import Scheme, describe

FORMAT_VERSION = 1
"""Version of the on-disk format that this code reads and writes."""
ROW_CHUNK = 2**14
"""Maximum number of rows in one inner chunk of a per-row array."""
MAX_SHARDS = 2**24
"""Maximum number of shards of a store."""
MAX_SHARD_ROWS = 2**24
"""Maximum number of rows that a shard can have room for."""
MAX_SHARD_ENTRIES = 2**26
"""Maximum number of entries that a shard can have room for. The limits on rows and entries bound the memory of a
reader, even if the store is hostile: decoding the entries of one shard takes at most about 2.5 GB."""

ELSEWHERE = ("target", "losses", "appends")
"""Fields of `StoreSpec` that are not stored in the root group's attributes, but read from other places in the store."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class TokenizerSpec:
    """The tokenizer that made the token ids."""

    name: str
    """Name or path from which the tokenizer was loaded; informational."""
    fingerprint: str
    """sha256 of the tokenizer's vocabulary and merges."""
    vocab_size: int
    """Size of the tokenizer's vocabulary: the largest token id + 1. A model's output embedding may have more rows."""
    chat_template: str | None
    """sha256 of the chat template; None if the documents were made without one."""


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """The data whose documents were tokenized."""

    source: str
    """Path, URL or `hf:` name of the data, as given by the user but without credentials; informational."""
    digest: str | None
    """sha256 over the paths, sizes and fsspec version keys (`ukey`) of the data's files; None for `hf:` names.
    Informational."""
    columns: Literal["text", "prompt_response", "messages", "input_ids"]
    """Columns of the data from which the documents were made."""
    mask_policy: Literal["all", "response", "given"]
    """Predictions whose loss mask is 1: all of them (`all`), those of response tokens (`response`), or those that the
    data's `loss_mask` column selects (`given`)."""
    documents: str | None = None
    """sha256 over the digests of the `tokens` shards that hold the documents, in the order of the shards. This hash
    identifies the documents themselves, not the files that they came from. Informational."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The model that computed a layer."""

    name: str
    """Hugging Face id or folder of the model; informational."""
    revision: str
    """Commit hash on the Hugging Face hub, or a digest of the configuration and weights in the model's folder."""
    dtype: str
    """Data type in which the model ran, such as `bfloat16`."""
    padded_vocab_size: int
    """Number of rows of the output embedding. Rows beyond the tokenizer's vocabulary get no probability."""


@dataclass(frozen=True, kw_only=True)
class TargetSpec:
    """Spec of the `target` layer: the model, the scheme and the codes of logprobs."""

    model: ModelSpec
    """The target model."""
    scheme: Scheme
    """Rule that selects the entries of a row."""
    codebook: Codebook = field(default_factory=Codebook)
    """Codes in which logprobs are stored."""
    temperature: float = 1.0
    """Temperature at which logprobs are normalised; always 1 in this format version."""

    @property
    def room(self) -> int:
        """Maximum number of entries that a row can have."""
        if self.scheme.name == "hybrid":
            # A kept token has a probability of at least `step`, and one token is drawn per `step` of the remaining
            # probability. The random start of the draws can add one more token.
            return int(1 / self.step) + 1
        return self.scheme.num_draws if self.scheme.draws else self.scheme.k

    @property
    def step(self) -> float:
        """Probability that one draw stands for. hybrid keeps tokens of at least this probability without drawing them.

        For sample, the step is 1 / num_draws. For hybrid, the step is slightly smaller: the lower end of a code. The
        code of an entry then tells whether the entry was drawn.
        """
        if self.scheme.name != "hybrid":
            return 1 / self.scheme.num_draws
        return self.codebook.lower_end(self.last_exact_code)

    @property
    def last_exact_code(self) -> int:
        """Largest code that an entry of hybrid can have without being drawn. Entries with larger codes were drawn.

        For other schemes, this is the last of all codes, 255.
        """
        return self.codebook.code_at(1 / self.scheme.num_draws) if self.scheme.name == "hybrid" else LEVELS - 1

    def __post_init__(self) -> None:
        if self.temperature != 1.0:
            raise ValueError(
                f"temperature must be 1, got temperature={self.temperature}; this version supports no other"
            )
        if self.scheme.name == "hybrid" and self.last_exact_code == LEVELS - 1:
            raise ValueError(
                f"num_draws must be smaller with exponent={self.codebook.exponent}, because the last code must lie "
                f"below 1 / num_draws, got num_draws={self.scheme.num_draws}; the exponent 4 is usual"
            )


@dataclass(frozen=True, kw_only=True)
class LossSpec:
    """Spec of a `losses/<name>` layer."""

    model: ModelSpec
    """The model whose losses the layer holds."""


@dataclass(frozen=True, kw_only=True)
class Append:
    """Documents that were added to a finished store, in additional shards."""

    data: DataSpec
    """The added documents."""
    first_shard: int
    """Number of the first added shard."""
    num_shards: int
    """Number of added shards."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_shards <= MAX_SHARDS or not 1 <= self.first_shard <= MAX_SHARDS:
            raise ValueError(
                f"first_shard and num_shards must be between 1 and {MAX_SHARDS}, got first_shard={self.first_shard}, "
                f"num_shards={self.num_shards}"
            )


@dataclass(frozen=True, kw_only=True)
class StoreSpec:
    """The identity and the sizes of a store.

    A dump into an existing store is refused if the dump's spec differs from the store's spec in any field that is not
    informational.
    """

    tokenizer: TokenizerSpec
    """Tokenizer that made the token ids."""
    data: DataSpec
    """Documents that were tokenized."""
    max_length: int
    """Maximum number of tokens of a document, at least 2; longer documents were split into windows."""
    shard_rows: int = 2**18
    """Number of rows that a shard has room for, at least `max_length`. If the number is above 2**14, it must be a
    multiple of 2**14."""
    num_shards: int
    """Number of shards that the documents of `data` fill. In the spec of an opened store, this number also includes the
    shards of all appends."""
    format_version: int = FORMAT_VERSION
    """Version of the on-disk format."""
    target: TargetSpec | None = None
    """Spec of the `target` layer, read from the attributes of that layer; None if the store has no target layer."""
    losses: dict[str, LossSpec] = field(default_factory=dict)
    """Specs of the `losses/<name>` layers by name, read from the attributes of these layers."""
    appends: tuple[Append, ...] = ()
    """Documents that were added later, in the order of their shards. Read from the records in `appends/`."""

    def __post_init__(self) -> None:
        if not 0 <= self.num_shards <= MAX_SHARDS:
            raise ValueError(
                f"num_shards must be at most {MAX_SHARDS}, got num_shards={self.num_shards}; give a larger --shard_rows"
            )
        # Token ids are stored as uint32.
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
        # Larger shards have inner chunks of ROW_CHUNK rows, which must divide a shard evenly.
        if self.shard_rows > ROW_CHUNK and self.shard_rows % ROW_CHUNK:
            raise ValueError(
                f"shard_rows must be a multiple of {ROW_CHUNK} if it is larger, got shard_rows={self.shard_rows}; "
                f"give {-(-self.shard_rows // ROW_CHUNK) * ROW_CHUNK}"
            )


def to_json(spec: StoreSpec | TargetSpec | LossSpec) -> dict[str, Any]:
    """Returns a spec as the JSON object that is stored in its group's attributes, without the fields in `ELSEWHERE`."""
    values = dataclasses.asdict(spec)
    return {name: value for name, value in values.items() if name not in ELSEWHERE}


def check_room(shard_rows: int, room: int) -> None:
    """Checks that a shard cannot have more than `MAX_SHARD_ENTRIES` entries. This limit bounds the memory of a reader.

    Args:
        shard_rows: Number of rows that a shard has room for.
        room: Maximum number of entries of a row.

    Raises:
        ValueError: A shard could have more than `MAX_SHARD_ENTRIES` entries.
    """
    if shard_rows * room > MAX_SHARD_ENTRIES:
        raise ValueError(
            f"entries of a row must be at most {MAX_SHARD_ENTRIES // shard_rows} in shards of {shard_rows} rows, got "
            f"up to {room}; give a smaller --k or --num_draws, or a store with a smaller --shard_rows"
        )


def maker(spec: StoreSpec | TargetSpec | LossSpec) -> str:
    """Returns a digest over all fields of a spec that `check_same` compares.

    Commit records hold this digest as `made_by`. The digest tells whether a shard was made with the tokenizer, model
    and scheme that the store's specs describe.
    """
    text = json.dumps(_identity(spec), sort_keys=True)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _identity(spec: object) -> object:
    if not dataclasses.is_dataclass(spec):
        return spec
    # The values of tokens depend neither on the other layers nor on appends.
    joined = ELSEWHERE if isinstance(spec, StoreSpec) else ()
    return {
        f.name: _identity(getattr(spec, f.name))
        for f in dataclasses.fields(spec)
        if f.name not in joined and (f.name not in INFORMATIONAL or isinstance(spec, Scheme))
    }


def from_json(cls: type[T], values: object, where: str) -> T:
    """Builds a spec from JSON values, and checks every type, because a store may come from an untrusted source.

    Args:
        cls: Class of the spec: StoreSpec, TargetSpec, LossSpec, Append, or the class of a field of one of these.
        values: The JSON object, such as the content of a group's attributes.
        where: Name of the spec for error messages.

    Raises:
        FormatError: The spec has another format version, or a field is missing, unknown, of the wrong type or out of
            range.
    """
    if not isinstance(values, dict):
        raise FormatError(
            f"{where} must be a JSON object, got {where}={values!r:.80}; this is not metadata of logitstore"
        )
    if cls is StoreSpec and (version := values.get("format_version")) != FORMAT_VERSION:
        raise FormatError(
            f"format_version must be {FORMAT_VERSION}, got format_version={version!r:.80}; "
            "open the store with the version of logitstore that wrote it"
        )
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if cls is StoreSpec:
        # These fields come from other places of the store, so the attributes must not hold them.
        for name in ELSEWHERE:
            del fields[name]
    if unknown := sorted(set(values) - set(fields)):
        raise FormatError(
            f"{where} must have known fields only, got {unknown[0]!r:.80}; "
            "a newer version of logitstore may have written it"
        )
    converted = {}
    for name, f in fields.items():
        if name in values:
            converted[name] = _convert(hints[name], values[name], f"{where}.{name}")
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise FormatError(f"{where} must have a field {name!r}, got none; the metadata is incomplete")
    # All types are correct at this point. __post_init__ raises ValueError for values that are out of range.
    try:
        return cls(**converted)
    except ValueError as error:
        raise FormatError(f"{where} is malformed: {error}") from error


def _convert(hint: Any, value: object, where: str) -> Any:  # noqa: ANN401
    if dataclasses.is_dataclass(hint):
        return from_json(hint, value, where)  # type: ignore[arg-type]
    if isinstance(hint, types.UnionType):
        # Every union in a spec has the form `X | None`.
        allowed = typing.get_args(hint)
        if value is None and type(None) in allowed:
            return None
        return _convert(allowed[0], value, where)
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            raise FormatError(f"{where} must be one of {list(typing.get_args(hint))}, got {where}={value!r:.80}")
        return value
    # Some JSON writers write 1.0 as 1. Below 2**53 the conversion to float is exact.
    if hint is float and type(value) is int and abs(value) < 2**53:
        return float(value)
    # Types are compared exactly, because isinstance would accept JSON's true and false as int.
    if hint in (int, float, str) and type(value) is hint:
        return value
    raise FormatError(f"{where} must be of type {getattr(hint, '__name__', hint)}, got {where}={value!r:.80}")


INFORMATIONAL = frozenset({"name", "source", "digest", "documents", "num_shards"})
"""Names of fields that `check_same` ignores, because two specs of the same content may differ in these fields. These
fields say where the content came from, or how much of the content exists. The `name` of a scheme is an exception and is
compared."""


def check_same(stored: object, given: object, what: str, next_step: str) -> None:
    """Checks that two specs agree in all fields but the informational ones.

    Args:
        stored: Spec in the store.
        given: Requested spec, of the same class.
        what: Name of the spec for the error message.
        next_step: Last part of the error message: what the user can do.

    Raises:
        IdentityError: The specs differ. The message names the first field that differs and both of its values.
    """
    for f in dataclasses.fields(stored):  # type: ignore[arg-type]
        old, new = getattr(stored, f.name), getattr(given, f.name)
        # Messages about a model or a scheme show what a user would give, and not only the field that differs.
        if isinstance(old, ModelSpec) and old.revision != new.revision:
            revisions = [f"{each.name} (revision {each.revision[:19]})" for each in (old, new)]
            raise IdentityError(
                f"{what}.{f.name} must be {revisions[0]} as in the store, got {revisions[1]}; {next_step}"
            )
        if isinstance(old, Scheme) and old != new:
            raise IdentityError(
                f"{what}.{f.name} must be {describe(old)} as in the store, got {describe(new)}; {next_step}"
            )
        # Nested specs are compared by field, because they have informational fields of their own.
        if dataclasses.is_dataclass(old) and dataclasses.is_dataclass(new):
            check_same(old, new, f"{what}.{f.name}", next_step)
        elif old != new and f.name not in INFORMATIONAL:
            raise IdentityError(f"{what}.{f.name} must be {old!r} as in the store, got {f.name}={new!r}; {next_step}")
