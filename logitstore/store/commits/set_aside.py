"""Records of whole shards that were set aside after repeated failures. A record tells people why the shard failed.

A later dump tries shards with such a record last; the records have no other effect. For readers, a shard without a
commit is missing, whether it was set aside or not. If the shard is committed later, its set-aside record is ignored.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import re
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from logitstore.errors import FormatError
from logitstore.format.layout import layer_arrays
from logitstore.format.strict_json import parse_json, to_json_bytes
from logitstore.store.commits.index import read_index

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from logitstore.storage.storage import Storage

FOLDER = "set_aside"
"""Folder of the records, with one folder for each layer."""
NAME = re.compile(r"(?:[0-9]{6}|[1-9][0-9]{6,8})\.json")
"""Pattern of a record's file name: the shard's number, with at least six digits."""
REASON_LENGTH = 300
"""Maximum length of a reason, in characters."""
MAX_BYTES = 2**13
"""Maximum size of a record, in bytes. JSON takes up to 12 bytes for a character of the reason; the rest is for the
other fields."""
MOST = 1000
"""Maximum number of records that are read for a layer. If more shards fail, the cause lies in the model, and further
reasons do not help to find it."""
AT_ONCE = 100
"""Maximum number of records that are requested together."""


@dataclass(frozen=True, kw_only=True)
class SetAside:
    """The record of a shard that a job set aside after repeated failures."""

    reason: str
    """Message of the last failure, at most REASON_LENGTH characters."""
    attempts: int
    """Number of times that the job tried the shard."""
    when: str
    """UTC time at which the record was written, in ISO 8601 format."""
    writer: str
    """Host name and process id of the job, as `host:pid`."""


UNREADABLE = SetAside(reason="a record that cannot be read", attempts=0, when="", writer="")
"""Replaces a record that is malformed or too long."""


def record(storage: Storage, layer: str, shard: int, reason: str, attempts: int) -> SetAside:
    """Writes the record of a shard that is set aside. Replaces an earlier record of the shard.

    Args:
        storage: The store's root.
        layer: The shard's layer.
        shard: The shard's number.
        reason: Message of the last failure; joined to one line and cut to REASON_LENGTH characters.
        attempts: Number of times that the shard was tried.

    Returns:
        The record as it was written.
    """
    # The reason is often an exception's message, which may be long and have several lines.
    entry = SetAside(
        reason=" ".join(reason.split())[:REASON_LENGTH],
        attempts=attempts,
        when=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        writer=f"{socket.gethostname()}:{os.getpid()}",
    )
    storage.put(_path(layer, shard), to_json_bytes(dataclasses.asdict(entry)))
    return entry


def read_set_aside(storage: Storage, layer: str) -> dict[int, SetAside]:
    """Reads the records of a layer's set-aside shards that are still not committed.

    Returns:
        The records by shard number, in ascending order, for at most MOST shards. UNREADABLE replaces a record that is
        malformed or longer than MAX_BYTES.
    """
    if not (names := _names(storage, layer)):
        return {}
    # Records of committed shards are left over from earlier failures, so they are not read.
    committed = read_index(storage, layer)
    shards = [shard for shard in map(_shard, names) if shard not in committed][:MOST]
    return {shard: entry for shard, entry in zip(shards, _read(storage, layer, shards), strict=True) if entry}


def explain_missing(storage: Storage, layer: str) -> str:
    """Returns the end of a message that explains why shards of a layer are missing; "" if no shard is set aside.

    The text gives the reason for which the first set-aside shard of the layer failed.
    """
    found = read_set_aside(storage, layer)
    return "".join(f"; shard {shard} was set aside: {entry.reason}" for shard, entry in list(found.items())[:1])


def clear(storage: Storage, layer: str, shard: int) -> None:
    """Removes the set-aside record of a shard, if the shard has one."""
    storage.remove(_path(layer, shard))


def clear_committed(storage: Storage, layer: str) -> None:
    """Removes the set-aside records of all shards of a layer that were committed after they were set aside."""
    if names := _names(storage, layer):
        committed = read_index(storage, layer)
        storage.for_each(lambda shard: clear(storage, layer, shard), [s for s in map(_shard, names) if s in committed])


def _path(layer: str, shard: int) -> str:
    layer_arrays(layer)  # Raises ValueError for an invalid name, before the name becomes part of a path.
    return f"{FOLDER}/{layer}/{shard:06d}.json"


def _names(storage: Storage, layer: str) -> list[str]:
    """Lists the names of a layer's records, in the order of the shard numbers."""
    layer_arrays(layer)
    # Names are sorted by number, because sorting as text would put shard 1000000 before shard 999999.
    return sorted((name for name in storage.names(f"{FOLDER}/{layer}") if NAME.fullmatch(name)), key=_shard)


def _shard(name: str) -> int:
    return int(name.removesuffix(".json"))


def _read(storage: Storage, layer: str, shards: Sequence[int]) -> Iterator[SetAside | None]:
    """Yields the record of each shard, or None for a record that was removed after the listing."""
    for start in range(0, len(shards), AT_ONCE):
        paths = [_path(layer, shard) for shard in shards[start : start + AT_ONCE]]
        for path, data in zip(paths, storage.get_many(paths, [MAX_BYTES] * len(paths)), strict=True):
            yield None if data is None else _parsed(path, data)


def _parsed(path: str, data: bytes) -> SetAside:
    try:
        value: Any = parse_json(path, data) if len(data) <= MAX_BYTES else None
    except FormatError:
        return UNREADABLE
    # Types are compared exactly, because isinstance would accept JSON's true as an int.
    kinds = {"reason": str, "attempts": int, "when": str, "writer": str}
    if not isinstance(value, dict) or {name: type(found) for name, found in value.items()} != kinds:
        return UNREADABLE
    return SetAside(**value | {"reason": value["reason"][:REASON_LENGTH]})
