"""Commit records: the small JSON files, written last, that make a shard of a layer exist for readers.

The name of a record holds all that numbering documents and seeing stale shards needs, so that one listing of a
layer's folder does for any number of shards. Its content holds all that checking the values needs.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
import re
import socket
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np

from logitstore.errors import DamagedShardError, FormatError
from logitstore.layout import layer_arrays
from logitstore.measures import is_measured
from logitstore.storage import parse_json, to_json_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from logitstore.storage import Storage

IDENTITY = 12
"""Hexadecimal digits of a digest that stand in a record's name."""
NOTHING = "0" * IDENTITY
"""Stands in a record's name for the layer below tokens."""

_COUNT = "(?:0|[1-9][0-9]{0,9})"
NAME = re.compile(
    rf"(?:[0-9]{{6}}|[1-9][0-9]{{6,8}})-{_COUNT}d-{_COUNT}r-{_COUNT}c-{_COUNT}e-{_COUNT}s"
    rf"-[0-9a-f]{{{IDENTITY}}}-[0-9a-f]{{{IDENTITY}}}\.json"
)
"""Of every shard with certain counts and digests there is one name only, so that names need not be kept."""
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
MAX_SECONDS = 1e12
"""Longer than anybody computes: what is read is added up."""
CHECKSUM = "crc32c"
"""Field of a stored record: over all others, also those that nothing can be compared with."""


@dataclass(frozen=True, kw_only=True)
class Commit:
    """What one shard of one layer was when it was written."""

    layer: str
    shard: int
    documents: int
    """Documents in the shard."""
    rows: int
    """Rows in the shard, of all its documents."""
    counted: int
    """Rows whose loss mask is 1."""
    entries: int
    """Entries in the shard; 0 for layers that have none."""
    set_aside: dict[int, str] = field(default_factory=dict)
    """Documents that could not be computed, by their place in the shard, and why. Their rows are as if masked."""
    checksums: dict[str, str]
    """crc32c of each array's values in this shard, little-endian, as 8 hexadecimal digits."""
    digest: str
    """sha256 of all the layer's values in this shard: its identity."""
    computed_from: str | None
    """Digest of the shard it was computed from: tokens for `target`, target for `losses/*`, None for `tokens`."""
    made_by: str
    """sha256 of what the layer's spec says of its maker: another model's values never pass for this one's."""
    seconds: float
    """How long computing and writing took."""
    writer: str
    """Host and process."""
    written: str
    """When, UTC."""
    fidelity: dict[str, float] = field(default_factory=dict)
    """How true the values are, where that was measured: sums over some rows of the shard, by name."""

    @property
    def name(self) -> str:
        """The record's file name."""
        counts = (self.documents, self.rows, self.counted, self.entries, len(self.set_aside))
        return record_name(self.shard, *counts, digest=identity(self.digest), origin=identity(self.computed_from))


@dataclass(frozen=True, kw_only=True)
class Index:
    """The committed shards of a layer, by number, as one listing of their records tells them.

    S shards, of 72 bytes each.
    """

    layer: str
    shards: NDArray[np.int64]
    """[S], ascending."""
    documents: NDArray[np.int64]
    rows: NDArray[np.int64]
    counted: NDArray[np.int64]
    entries: NDArray[np.int64]
    set_aside: NDArray[np.int64]
    """[S] each: the counts of the same name in a commit; documents set aside."""
    digests: NDArray[np.bytes_]
    """[S]: first digits of each shard's digest."""
    origins: NDArray[np.bytes_]
    """[S]: first digits of the digest that it was computed from."""
    contested: frozenset[int]
    """Shards with more than one record: none of them can be trusted, and all appear above once."""
    unknown: tuple[str, ...]
    """Names that are not those of records. They mean nothing."""

    def __len__(self) -> int:
        return len(self.shards)

    def __contains__(self, shard: int) -> bool:
        return self.find(shard) is not None

    def find(self, shard: int) -> int | None:
        """Returns the place of a shard in the arrays, None if it is not committed."""
        place = int(np.searchsorted(self.shards, shard))
        return place if place < len(self.shards) and self.shards[place] == shard else None

    def name(self, place: int) -> str:
        """Returns the name of the record at a place in the arrays."""
        columns = (self.shards, self.documents, self.rows, self.counted, self.entries, self.set_aside)
        digest, origin = bytes(self.digests[place]).decode(), bytes(self.origins[place]).decode()
        return record_name(*(int(column[place]) for column in columns), digest=digest, origin=origin)

    @cached_property
    def committed(self) -> frozenset[int]:
        """The shards as a set."""
        return frozenset(self.shards.tolist())

    def upto(self, num_shards: int) -> Index:
        """Returns the part of it below a shard."""
        stop = int(np.searchsorted(self.shards, num_shards))
        if stop == len(self.shards):
            return self
        parts = {name: getattr(self, name)[:stop] for name in _COLUMNS}
        return dataclasses.replace(self, **parts, contested=frozenset(s for s in self.contested if s < num_shards))


_HEAD = -len(f"-{NOTHING}-{NOTHING}.json")
_DIGESTS = (slice(_HEAD + 1, _HEAD + 1 + IDENTITY), slice(_HEAD + 2 + IDENTITY, _HEAD + 2 + 2 * IDENTITY))
"""Where the counts of a name end, and where its digests are: all are of the same length there."""

_COLUMNS = ("shards", "documents", "rows", "counted", "entries", "set_aside", "digests", "origins")


def folder(layer: str) -> str:
    """Returns where the records of a layer are."""
    return f"commits/{layer}"


def record_name(
    shard: int, documents: int, rows: int, counted: int, entries: int, set_aside: int, *, digest: str, origin: str
) -> str:
    """Returns the file name of a record; `digest` and `origin` as `identity` gives them."""
    return f"{shard:06d}-{documents}d-{rows}r-{counted}c-{entries}e-{set_aside}s-{digest}-{origin}.json"


def read_index(storage: Storage, layer: str) -> Index:
    """Lists the committed shards of a layer."""
    return index_names(layer, storage.names(folder(layer)))


def index_names(layer: str, names: Sequence[str]) -> Index:
    """Reads what the names of records, in order, say. Some 100,000 of them are to take a tenth of a second."""
    records = [name for name in names if NAME.fullmatch(name)]
    heads = "-".join([name[:_HEAD] for name in records]).encode()
    numbers = np.fromstring(heads.translate(None, b"drces"), dtype=np.int64, sep="-").reshape(-1, 6)
    digests, origins = (np.array([name[part] for name in records], dtype=f"S{IDENTITY}") for part in _DIGESTS)
    order = np.argsort(numbers[:, 0], kind="stable")
    shards = numbers[order, 0]
    is_last = np.append(shards[1:] != shards[:-1], True)[: len(shards)]
    kept = order[is_last]
    return Index(
        layer=layer,
        **dict(zip(_COLUMNS, [*numbers[kept].T.copy(), digests[kept], origins[kept]], strict=True)),
        contested=frozenset(shards[~is_last].tolist()),
        unknown=tuple(name for name in names if not NAME.fullmatch(name)) if len(records) < len(names) else (),
    )


def names_of(storage: Storage, layer: str, shard: int) -> list[str]:
    """Lists the records of a shard: one if it is committed."""
    return [name for name in storage.names_with(folder(layer), f"{shard:06d}-") if NAME.fullmatch(name)]


def find(storage: Storage, layer: str, shard: int) -> Commit | None:
    """Reads the record of a shard as it is now; None if it is not committed.

    Raises:
        DamagedShardError: There are several, or the record is not what its name says.
    """
    names = names_of(storage, layer, shard)
    if not names:
        return None
    if len(names) > 1:
        raise DamagedShardError(layer, shard, f"{len(names)} commit records")
    try:
        data = storage.get(f"{folder(layer)}/{names[0]}")
    except FileNotFoundError:  # taken back since it was listed
        return None
    except FormatError as error:
        raise DamagedShardError(layer, shard, "a commit record too long to be one") from error
    return parse(data, layer, shard, names[0])


def identity(digest: str | None) -> str:
    """Returns the digits of a digest that stand in a record's name."""
    return NOTHING if digest is None else digest.removeprefix("sha256:")[:IDENTITY]


def describe(
    layer: str,
    shard: int,
    arrays: Mapping[str, NDArray[Any]],
    *,
    documents: int,
    rows: int,
    counted: int,
    computed_from: str | None,
    made_by: str,
    seconds: float,
    set_aside: Mapping[int, str] | None = None,
    fidelity: Mapping[str, float] | None = None,
) -> Commit:
    """Computes the commit record of a shard from the values that were written."""
    values = {spec.name: np.ascontiguousarray(arrays[spec.name], dtype=spec.dtype) for spec in layer_arrays(layer)}
    return Commit(
        layer=layer,
        shard=shard,
        documents=documents,
        rows=rows,
        counted=counted,
        entries=len(values["gaps"]) if "gaps" in values else 0,
        set_aside=dict(set_aside or {}),
        checksums={name: checksum(value) for name, value in values.items()},
        digest=digest(layer, values),
        computed_from=computed_from,
        made_by=made_by,
        seconds=round(seconds, 3),
        writer=f"{socket.gethostname()}:{os.getpid()}",
        written=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        fidelity=dict(fidelity or {}),
    )


def digest(layer: str, arrays: Mapping[str, NDArray[Any]]) -> str:
    """Returns the identity of a shard's values, independent of how they are compressed (docs/format.md)."""
    sha = hashlib.sha256()
    for spec in layer_arrays(layer):
        values = np.ascontiguousarray(arrays[spec.name], dtype=spec.dtype)
        sha.update(f"{spec.name}:{spec.dtype}:{len(values)};".encode())
        sha.update(values.view(np.uint8).data)
    return f"sha256:{sha.hexdigest()}"


def checksum(values: NDArray[Any]) -> str:
    """Returns the crc32c of an array's bytes, as 8 hexadecimal digits."""
    return f"{google_crc32c.value(np.ascontiguousarray(values).view(np.uint8)):08x}"


def length(commit: Commit, per: str) -> int:
    """Returns how many values of an array numbered `per` row, document or entry a shard holds."""
    return {"row": commit.rows, "document": commit.documents, "entry": commit.entries}[per]


def to_bytes(commit: Commit) -> bytes:
    """Returns a record as it is stored: its fields, `fidelity` only if there is some, and a checksum over them."""
    values = dataclasses.asdict(commit)
    if not commit.fidelity:
        del values["fidelity"]
    values["set_aside"] = {str(document): reason for document, reason in commit.set_aside.items()}
    return to_json_bytes(values | {CHECKSUM: checksum_of(values)})


def checksum_of(values: Mapping[str, Any]) -> str:
    """Returns the checksum of a record's fields but that one, as they are stored."""
    return f"{google_crc32c.value(json.dumps(values, sort_keys=True).encode()):08x}"


def parse(data: bytes, layer: str, shard: int, name: str) -> Commit:
    """Reads a record, and checks it against its name and its checksum.

    Raises:
        DamagedShardError: It is not what its name says, lacks a field, or was changed.
    """
    try:
        value = parse_json(name, data)
    except FormatError as error:
        raise DamagedShardError(layer, shard, "a commit record that is not JSON") from error
    stated = value.pop(CHECKSUM, None) if isinstance(value, dict) else None
    kinds: dict[str, tuple[type, ...]] = {
        "layer": (str,), "shard": (int,), "documents": (int,), "rows": (int,), "counted": (int,), "entries": (int,),
        "set_aside": (dict,), "checksums": (dict,), "digest": (str,), "computed_from": (str, type(None)),
        "made_by": (str,), "seconds": (int, float), "writer": (str,), "written": (str,),
    }  # fmt: skip
    if isinstance(value, dict) and "fidelity" in value:
        kinds["fidelity"] = (dict,)
    if not isinstance(value, dict) or set(value) != set(kinds):
        raise DamagedShardError(layer, shard, "a commit record with other fields")
    for field_name, allowed in kinds.items():
        if type(value[field_name]) not in allowed:
            raise DamagedShardError(layer, shard, f"a commit record with {field_name}={value[field_name]!r:.80}")
    if min(value["documents"], value["rows"], value["counted"], value["entries"]) < 0:
        raise DamagedShardError(layer, shard, "a commit record with negative counts")
    if max(value["documents"], value["counted"]) > value["rows"] or len(value["set_aside"]) > value["documents"]:
        raise DamagedShardError(layer, shard, "a commit record of fewer rows than it counts")
    if not 0 <= value["seconds"] < MAX_SECONDS:
        raise DamagedShardError(layer, shard, f"a commit record with seconds={value['seconds']!r:.80}")
    if value["entries"] and layer != "target":
        raise DamagedShardError(layer, shard, f"a commit record of {value['entries']} entries of {layer}")
    checksums = value["checksums"]
    if set(checksums) != {array.name for array in layer_arrays(layer)}:
        raise DamagedShardError(layer, shard, "a commit record of other arrays")
    if not all(isinstance(found, str) and re.fullmatch("[0-9a-f]{8}", found) for found in checksums.values()):
        raise DamagedShardError(layer, shard, "a commit record with malformed checksums")
    if not all(DIGEST.fullmatch(d) for d in (value["digest"], value["computed_from"]) if d is not None):
        raise DamagedShardError(layer, shard, f"a commit record with digest={value['digest']!r:.80}")
    documents = value["set_aside"]
    if not all(re.fullmatch(r"[0-9]{1,10}", number) and isinstance(documents[number], str) for number in documents):
        raise DamagedShardError(layer, shard, "a commit record with malformed set_aside")
    if not is_measured(layer, value.get("fidelity", {}), value["counted"]):
        raise DamagedShardError(layer, shard, "a commit record with malformed fidelity")
    found = checksum_of(value)
    value["set_aside"] = {int(number): reason for number, reason in documents.items()}
    commit = Commit(**value)
    if (commit.layer, commit.shard) != (layer, shard):
        raise DamagedShardError(layer, shard, f"the commit record of shard {commit.shard} of {commit.layer!r:.80}")
    if commit.name != name:
        raise DamagedShardError(layer, shard, f"a commit record named {name}, not {commit.name:.120}")
    if found != stated:
        raise DamagedShardError(layer, shard, f"a commit record with checksum {found}, not {stated!r:.20}")
    return commit
