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
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np

from logitstore.errors import DamagedShardError, FormatError
from logitstore.format.fidelity_sums import is_measured
from logitstore.format.layout import layer_arrays
from logitstore.format.strict_json import parse_json, to_json_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray


SHORT_DIGEST_LENGTH = 12
"""Hexadecimal digits of a digest that stand in a record's name."""
NO_DIGEST = "0" * SHORT_DIGEST_LENGTH
"""Stands in a record's name for the layer below tokens."""

_COUNT = "(?:0|[1-9][0-9]{0,9})"
RECORD_NAME = re.compile(
    rf"(?:[0-9]{{6}}|[1-9][0-9]{{6,8}})-{_COUNT}d-{_COUNT}r-{_COUNT}c-{_COUNT}e-{_COUNT}s"
    rf"-[0-9a-f]{{{SHORT_DIGEST_LENGTH}}}-[0-9a-f]{{{SHORT_DIGEST_LENGTH}}}\.json"
)
"""Of every shard with certain counts and digests there is one name only, so that names need not be kept."""
SHA256_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
MAX_SECONDS = 1e12
"""Longer than anybody computes: what is read is added up."""
CHECKSUM_FIELD = "crc32c"
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
        return record_name(
            self.shard, *counts, digest=short_digest(self.digest), origin=short_digest(self.computed_from)
        )


def record_name(
    shard: int, documents: int, rows: int, counted: int, entries: int, set_aside: int, *, digest: str, origin: str
) -> str:
    """Returns the file name of a record; `digest` and `origin` as `identity` gives them."""
    return f"{shard:06d}-{documents}d-{rows}r-{counted}c-{entries}e-{set_aside}s-{digest}-{origin}.json"


def short_digest(digest: str | None) -> str:
    """Returns the digits of a digest that stand in a record's name."""
    return NO_DIGEST if digest is None else digest.removeprefix("sha256:")[:SHORT_DIGEST_LENGTH]


def make_commit(
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
        checksums={name: crc32c(value) for name, value in values.items()},
        digest=layer_digest(layer, values),
        computed_from=computed_from,
        made_by=made_by,
        seconds=round(seconds, 3),
        writer=f"{socket.gethostname()}:{os.getpid()}",
        written=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        fidelity=dict(fidelity or {}),
    )


def layer_digest(layer: str, arrays: Mapping[str, NDArray[Any]]) -> str:
    """Returns the identity of a shard's values, independent of how they are compressed (docs/format.md)."""
    sha = hashlib.sha256()
    for spec in layer_arrays(layer):
        values = np.ascontiguousarray(arrays[spec.name], dtype=spec.dtype)
        sha.update(f"{spec.name}:{spec.dtype}:{len(values)};".encode())
        sha.update(values.view(np.uint8).data)
    return f"sha256:{sha.hexdigest()}"


def crc32c(values: NDArray[Any]) -> str:
    """Returns the crc32c of an array's bytes, as 8 hexadecimal digits."""
    return f"{google_crc32c.value(np.ascontiguousarray(values).view(np.uint8)):08x}"


def num_values(commit: Commit, per: str) -> int:
    """Returns how many values of an array numbered `per` row, document or entry a shard holds."""
    return {"row": commit.rows, "document": commit.documents, "entry": commit.entries}[per]


def commit_bytes(commit: Commit) -> bytes:
    """Returns a record as it is stored: its fields, `fidelity` only if there is some, and a checksum over them."""
    values = dataclasses.asdict(commit)
    if not commit.fidelity:
        del values["fidelity"]
    values["set_aside"] = {str(document): reason for document, reason in commit.set_aside.items()}
    return to_json_bytes(values | {CHECKSUM_FIELD: record_checksum(values)})


def record_checksum(values: Mapping[str, Any]) -> str:
    """Returns the checksum of a record's fields but that one, as they are stored."""
    return f"{google_crc32c.value(json.dumps(values, sort_keys=True).encode()):08x}"


def parse_commit(data: bytes, layer: str, shard: int, name: str) -> Commit:
    """Reads a record, and checks it against its name and its checksum.

    Raises:
        DamagedShardError: It is not what its name says, lacks a field, or was changed.
    """
    try:
        value = parse_json(name, data)
    except FormatError as error:
        raise DamagedShardError(layer, shard, "a commit record that is not JSON") from error
    stated = value.pop(CHECKSUM_FIELD, None) if isinstance(value, dict) else None
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
    if not all(SHA256_DIGEST.fullmatch(d) for d in (value["digest"], value["computed_from"]) if d is not None):
        raise DamagedShardError(layer, shard, f"a commit record with digest={value['digest']!r:.80}")
    documents = value["set_aside"]
    if not all(re.fullmatch(r"[0-9]{1,10}", number) and isinstance(documents[number], str) for number in documents):
        raise DamagedShardError(layer, shard, "a commit record with malformed set_aside")
    if not is_measured(layer, value.get("fidelity", {}), value["counted"]):
        raise DamagedShardError(layer, shard, "a commit record with malformed fidelity")
    found = record_checksum(value)
    value["set_aside"] = {int(number): reason for number, reason in documents.items()}
    commit = Commit(**value)
    if (commit.layer, commit.shard) != (layer, shard):
        raise DamagedShardError(layer, shard, f"the commit record of shard {commit.shard} of {commit.layer!r:.80}")
    if commit.name != name:
        raise DamagedShardError(layer, shard, f"a commit record named {name}, not {commit.name:.120}")
    if found != stated:
        raise DamagedShardError(layer, shard, f"a commit record with checksum {found}, not {stated!r:.20}")
    return commit
