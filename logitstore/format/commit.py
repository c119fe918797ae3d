"""Commit records: small JSON files, one for each shard of a layer. Readers see only shards that have a record.

A writer writes the commit record of a shard after all values of the shard. The file name of a record holds counts and
short digests. From the file names alone, a reader numbers the documents and finds stale shards. A shard is stale if the
layer below no longer holds the values from which the shard was computed. To open a store, a reader therefore only lists
the folder of each layer, however many shards there are. The content of a record holds the checksums and digests against
which a reader checks the values of the shard. docs/format.md describes the file names and the content.
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
"""Number of hexadecimal digits of each digest in a record's name."""
NO_DIGEST = "0" * SHORT_DIGEST_LENGTH
"""Placeholder in the name of a `tokens` record, where other records have the short digest of the layer below."""

_COUNT = "(?:0|[1-9][0-9]{0,9})"
RECORD_NAME = re.compile(
    rf"(?:[0-9]{{6}}|[1-9][0-9]{{6,8}})-{_COUNT}d-{_COUNT}r-{_COUNT}c-{_COUNT}e-{_COUNT}s"
    rf"-[0-9a-f]{{{SHORT_DIGEST_LENGTH}}}-[0-9a-f]{{{SHORT_DIGEST_LENGTH}}}\.json"
)
"""Pattern of a record's file name. Each number can be written in one way only. The shard, the counts and the digests
therefore determine the name, and a reader rebuilds a name from them instead of keeping all names in memory."""
SHA256_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
"""Pattern of a full digest. A record's name holds only the first digits of a digest."""
MAX_SECONDS = 1e12
"""Upper limit of a record's `seconds`. A record with this value or more is refused. With this limit, the sum of
`seconds` over all shards is always finite."""
CHECKSUM_FIELD = "crc32c"
"""Name of the stored field that holds the checksum over all other fields of a record. The checksum reveals damage even
in fields that cannot be compared with the arrays, such as `seconds`."""


@dataclass(frozen=True, kw_only=True)
class Commit:
    """The commit record of one shard of one layer: its counts, checksums, digests and origin."""

    layer: str
    """Name of the layer: `tokens`, `target` or `losses/<name>`."""
    shard: int
    """Number of the shard, from 0."""
    documents: int
    """Number of documents in the shard."""
    rows: int
    """Number of rows of all documents in the shard."""
    counted: int
    """Number of rows whose loss mask is 1, excluding rows of documents that were set aside."""
    entries: int
    """Number of entries in the shard; 0 for layers without entries."""
    set_aside: dict[int, str] = field(default_factory=dict)
    """Documents that could not be computed: maps the index of the document in the shard to the reason. Readers treat
    the loss mask of these documents as 0."""
    checksums: dict[str, str]
    """Checksums by array name: the crc32c of the array's values in this shard (little-endian bytes), as 8 hexadecimal
    digits."""
    digest: str
    """Digest of all values that the layer has in this shard: `sha256:` and 64 hexadecimal digits."""
    computed_from: str | None
    """Digest of the same shard in the layer below. The values were computed from that shard. The layer below `target`
    is `tokens`, and the layer below `losses/<name>` is `target`. None for `tokens`."""
    made_by: str
    """Digest of the layer's spec without its informational fields, as `spec.maker` returns it. Readers refuse a shard
    if this digest differs from the digest of the spec in the store, because such a shard was made with another
    tokenizer, model or scheme."""
    seconds: float
    """Time that it took to compute and write the shard, in seconds."""
    writer: str
    """Host name and process id of the writer, as `host:pid`."""
    written: str
    """Time of writing, ISO 8601, UTC."""
    fidelity: dict[str, float] = field(default_factory=dict)
    """Fidelity sums by name (docs/fidelity.md): sums over the measured rows of the shard, from which readers compute
    how faithful the values are. Empty if nothing was measured."""

    @property
    def name(self) -> str:
        """File name of the record."""
        counts = (self.documents, self.rows, self.counted, self.entries, len(self.set_aside))
        return record_name(
            self.shard, *counts, digest=short_digest(self.digest), origin=short_digest(self.computed_from)
        )


def record_name(
    shard: int, documents: int, rows: int, counted: int, entries: int, set_aside: int, *, digest: str, origin: str
) -> str:
    """Returns the file name of a record.

    Args:
        shard: Number of the shard.
        documents: Number of documents in the shard.
        rows: Number of rows in the shard.
        counted: Number of rows whose loss mask is 1, excluding rows of documents that were set aside.
        entries: Number of entries in the shard.
        set_aside: Number of documents that were set aside.
        digest: Short digest of the shard, as `short_digest` returns it.
        origin: Short digest of the same shard in the layer below; zeros for `tokens`.
    """
    return f"{shard:06d}-{documents}d-{rows}r-{counted}c-{entries}e-{set_aside}s-{digest}-{origin}.json"


def short_digest(digest: str | None) -> str:
    """Returns the first digits of a digest, as they appear in a record's name; zeros for None."""
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
    """Makes the commit record of a shard from the values that were written.

    Args:
        layer: Layer of the shard.
        shard: Number of the shard.
        arrays: Values of all arrays of the layer in this shard, by array name, without padding.
        documents: Number of documents in the shard.
        rows: Number of rows in the shard.
        counted: Number of rows whose loss mask is 1, excluding rows of documents that were set aside.
        computed_from: Digest of the same shard in the layer below; None for `tokens`.
        made_by: Digest of the layer's spec, from `spec.maker`.
        seconds: Time that it took to compute and write the shard, in seconds.
        set_aside: Documents that could not be computed: maps the index of the document in the shard to the reason.
        fidelity: Fidelity sums by name, if fidelity was measured.
    """
    # Checksums and digests are computed over the stored types, whatever types the caller used.
    values = {spec.name: np.ascontiguousarray(arrays[spec.name], dtype=spec.dtype) for spec in layer_arrays(layer)}
    return Commit(
        layer=layer,
        shard=shard,
        documents=documents,
        rows=rows,
        counted=counted,
        # `gaps` has one value per entry. Only `target` has this array.
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
    """Returns the digest of a shard's uncompressed values (docs/format.md, "Commits")."""
    sha = hashlib.sha256()
    for spec in layer_arrays(layer):
        values = np.ascontiguousarray(arrays[spec.name], dtype=spec.dtype)
        # The name, type and length of each array are hashed too. Without them, two different sets of arrays could give
        # the same bytes.
        sha.update(f"{spec.name}:{spec.dtype}:{len(values)};".encode())
        sha.update(values.view(np.uint8).data)
    return f"sha256:{sha.hexdigest()}"


def crc32c(values: NDArray[Any]) -> str:
    """Returns the crc32c of the bytes of an array, as 8 hexadecimal digits."""
    return f"{google_crc32c.value(np.ascontiguousarray(values).view(np.uint8)):08x}"


def num_values(commit: Commit, per: str) -> int:
    """Returns the number of values that an array has in a shard.

    Args:
        commit: Commit record of the shard.
        per: Whether the array has one value per "row", per "document" or per "entry".
    """
    return {"row": commit.rows, "document": commit.documents, "entry": commit.entries}[per]


def commit_bytes(commit: Commit) -> bytes:
    """Returns the stored form of a record: JSON of its fields and their checksum. An empty `fidelity` is left out."""
    values = dataclasses.asdict(commit)
    if not commit.fidelity:
        del values["fidelity"]
    # JSON has only strings as keys.
    values["set_aside"] = {str(document): reason for document, reason in commit.set_aside.items()}
    return to_json_bytes(values | {CHECKSUM_FIELD: record_checksum(values)})


def record_checksum(values: Mapping[str, Any]) -> str:
    """Returns the crc32c over the fields of a record, as 8 hexadecimal digits.

    Args:
        values: The fields in their stored form, without the checksum itself.
    """
    # With sorted keys, the checksum does not depend on the order of the fields in the file.
    return f"{google_crc32c.value(json.dumps(values, sort_keys=True).encode()):08x}"


def parse_commit(data: bytes, layer: str, shard: int, name: str) -> Commit:
    """Parses a commit record, and checks it against its name and its checksum.

    Args:
        data: Content of the record.
        layer: Layer whose folder holds the record.
        shard: Number of the shard that the record is expected to describe.
        name: File name of the record.

    Raises:
        DamagedShardError: The record does not match its name or its checksum, has missing or unknown fields, or holds
            impossible values.
    """
    try:
        value = parse_json(name, data)
    except FormatError as error:
        raise DamagedShardError(layer, shard, "a commit record that is not JSON") from error
    # The checksum covers all fields but itself.
    stated = value.pop(CHECKSUM_FIELD, None) if isinstance(value, dict) else None
    kinds: dict[str, tuple[type, ...]] = {
        "layer": (str,), "shard": (int,), "documents": (int,), "rows": (int,), "counted": (int,), "entries": (int,),
        "set_aside": (dict,), "checksums": (dict,), "digest": (str,), "computed_from": (str, type(None)),
        "made_by": (str,), "seconds": (int, float), "writer": (str,), "written": (str,),
    }  # fmt: skip
    # `commit_bytes` leaves `fidelity` out if nothing was measured.
    if isinstance(value, dict) and "fidelity" in value:
        kinds["fidelity"] = (dict,)
    if not isinstance(value, dict) or set(value) != set(kinds):
        raise DamagedShardError(layer, shard, "a commit record with missing or unknown fields")
    for field_name, allowed in kinds.items():
        # Types are compared exactly, because isinstance would accept JSON's true as a number.
        if type(value[field_name]) not in allowed:
            raise DamagedShardError(
                layer, shard, f"a commit record with {field_name}={value[field_name]!r:.80} of the wrong type"
            )
    if min(value["documents"], value["rows"], value["counted"], value["entries"]) < 0:
        raise DamagedShardError(layer, shard, "a commit record with negative counts")
    # Every document has at least one row, so there are never more documents than rows.
    if max(value["documents"], value["counted"]) > value["rows"] or len(value["set_aside"]) > value["documents"]:
        reason = (
            "a commit record with more documents than rows, more counted rows than rows, or more set aside than all"
        )
        raise DamagedShardError(layer, shard, reason)
    if not 0 <= value["seconds"] < MAX_SECONDS:
        raise DamagedShardError(layer, shard, f"a commit record with seconds={value['seconds']!r:.80} out of range")
    if value["entries"] and layer != "target":
        raise DamagedShardError(
            layer, shard, f"a commit record with entries={value['entries']} in a layer without entries"
        )
    checksums = value["checksums"]
    if set(checksums) != {array.name for array in layer_arrays(layer)}:
        raise DamagedShardError(layer, shard, "a commit record whose checksums are not those of the layer's arrays")
    if not all(isinstance(found, str) and re.fullmatch("[0-9a-f]{8}", found) for found in checksums.values()):
        raise DamagedShardError(layer, shard, "a commit record with malformed checksums")
    if not all(SHA256_DIGEST.fullmatch(d) for d in (value["digest"], value["computed_from"]) if d is not None):
        reason = f"a malformed digest: digest={value['digest']!r:.80}, computed_from={value['computed_from']!r:.80}"
        raise DamagedShardError(layer, shard, reason)
    documents = value["set_aside"]
    if not all(re.fullmatch(r"[0-9]{1,10}", number) and isinstance(documents[number], str) for number in documents):
        raise DamagedShardError(layer, shard, "a commit record with malformed set_aside")
    if not is_measured(layer, value.get("fidelity", {}), value["counted"]):
        raise DamagedShardError(layer, shard, "a commit record with malformed fidelity")
    # The checksum covers the stored form of the record, in which the keys of set_aside are strings.
    found = record_checksum(value)
    value["set_aside"] = {int(number): reason for number, reason in documents.items()}
    commit = Commit(**value)
    if (commit.layer, commit.shard) != (layer, shard):
        reason = f"a commit record that describes shard {commit.shard} of layer {commit.layer!r:.80}"
        raise DamagedShardError(layer, shard, reason)
    if commit.name != name:
        reason = f"a commit record named {name}, but with the content of {commit.name:.120}"
        raise DamagedShardError(layer, shard, reason)
    if found != stated:
        reason = f"a commit record whose content has the checksum {found}, not the stated {stated!r:.20}"
        raise DamagedShardError(layer, shard, reason)
    return commit
