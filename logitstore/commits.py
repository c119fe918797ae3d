"""Commit records: the small JSON files, written last, that make a shard of a layer exist for readers."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import os
import re
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np

from logitstore.errors import DamagedShardError, FormatError
from logitstore.layout import layer_arrays

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from logitstore.storage import Storage


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
    checksums: dict[str, str]
    """crc32c of each array's values in this shard, little-endian, as 8 hexadecimal digits."""
    digest: str
    """sha256 of all the layer's values in this shard: its identity."""
    computed_from: str | None
    """Digest of the shard it was computed from: tokens for `target`, target for `losses/*`, None for `tokens`."""
    seconds: float
    """How long computing and writing took."""
    writer: str
    """Host and process."""
    written: str
    """When, UTC."""


def describe(
    layer: str,
    shard: int,
    arrays: Mapping[str, NDArray[Any]],
    *,
    documents: int,
    rows: int,
    counted: int,
    computed_from: str | None,
    seconds: float,
) -> Commit:
    """Computes the commit record of a shard from the values that were written."""
    sha = hashlib.sha256()
    checksums = {}
    for spec in layer_arrays(layer):
        values = np.ascontiguousarray(arrays[spec.name], dtype=spec.dtype)
        sha.update(f"{spec.name}:{spec.dtype}:{len(values)};".encode())
        sha.update(values.view(np.uint8).data)
        checksums[spec.name] = checksum(values)
    return Commit(
        layer=layer,
        shard=shard,
        documents=documents,
        rows=rows,
        counted=counted,
        entries=len(arrays["token_ids"]) if "token_ids" in arrays else 0,
        checksums=checksums,
        digest=f"sha256:{sha.hexdigest()}",
        computed_from=computed_from,
        seconds=round(seconds, 3),
        writer=f"{socket.gethostname()}:{os.getpid()}",
        written=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def checksum(values: NDArray[Any]) -> str:
    """Returns the crc32c of an array's bytes, as 8 hexadecimal digits."""
    return f"{google_crc32c.value(np.ascontiguousarray(values).view(np.uint8).tobytes()):08x}"


def length(commit: Commit, per: str) -> int:
    """Returns how many values of an array numbered `per` row, document or entry a shard holds."""
    return {"row": commit.rows, "document": commit.documents, "entry": commit.entries}[per]


def _path(layer: str, shard: int) -> str:
    return f"commits/{layer}/{shard:06d}.json"


def committed_shards(storage: Storage, layer: str) -> set[int]:
    """Lists the committed shards of a layer."""
    names = storage.names(f"commits/{layer}")
    return {int(name[:-5]) for name in names if re.fullmatch(r"[0-9]{6,12}\.json", name)}


def write_commit(storage: Storage, commit: Commit) -> None:
    """Makes a shard exist. Everything it speaks of must have been written before."""
    storage.put_json(_path(commit.layer, commit.shard), dataclasses.asdict(commit))


def read_commits(storage: Storage, layer: str, shards: list[int]) -> list[Commit]:
    """Reads the records of some committed shards, in the order given.

    Raises:
        DamagedShardError: A record is not what its name says, or lacks a field.
    """
    try:
        values = storage.get_many_json([_path(layer, shard) for shard in shards])
    except FormatError:
        values = [_read_one(storage, layer, shard) for shard in shards]
    return [_from_json(value, layer, shard) for value, shard in zip(values, shards, strict=True)]


def _read_one(storage: Storage, layer: str, shard: int) -> Any:  # noqa: ANN401
    try:
        return storage.get_json(_path(layer, shard))
    except FormatError as error:
        raise DamagedShardError(layer, shard, "a commit record that is not JSON") from error


def _from_json(value: object, layer: str, shard: int) -> Commit:
    kinds: dict[str, tuple[type, ...]] = {
        "layer": (str,), "shard": (int,), "documents": (int,), "rows": (int,), "counted": (int,), "entries": (int,),
        "checksums": (dict,), "digest": (str,), "computed_from": (str, type(None)), "seconds": (int, float),
        "writer": (str,), "written": (str,),
    }  # fmt: skip
    if not isinstance(value, dict) or set(value) != set(kinds):
        raise DamagedShardError(layer, shard, "a commit record with other fields")
    for name, allowed in kinds.items():
        if type(value[name]) not in allowed:
            raise DamagedShardError(layer, shard, f"a commit record with {name}={value[name]!r:.80}")
    commit = Commit(**value)
    if (commit.layer, commit.shard) != (layer, shard):
        raise DamagedShardError(layer, shard, f"the commit record of shard {commit.shard} of {commit.layer!r:.80}")
    if min(commit.documents, commit.rows, commit.counted, commit.entries) < 0:
        raise DamagedShardError(layer, shard, "a commit record with negative counts")
    if set(commit.checksums) != {array.name for array in layer_arrays(layer)}:
        raise DamagedShardError(layer, shard, "a commit record of other arrays")
    return commit
