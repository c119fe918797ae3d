"""Records of whole shards that failed again and again: why, for people. A shard that is committed has none.

Nothing is decided by them but the order in which a later dump tries: what is missing is what has no commit.
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
NAME = re.compile(r"(?:[0-9]{6}|[1-9][0-9]{6,8})\.json")
REASON_LENGTH = 300
MAX_BYTES = 2**13
"""More than the longest record has: six bytes for each character of a reason, and the rest."""
MOST = 1000
"""Records that are read of a layer: who has more needs another model, not more names."""
AT_ONCE = 100


@dataclass(frozen=True, kw_only=True)
class SetAside:
    """Why a shard of a layer is missing."""

    reason: str
    """Of its last failure, at most REASON_LENGTH characters."""
    attempts: int
    """How often it was tried by the job that gave it up."""
    when: str
    """UTC."""
    writer: str
    """Host and process of that job."""


UNREADABLE = SetAside(reason="a record that cannot be read", attempts=0, when="", writer="")


def record(storage: Storage, layer: str, shard: int, reason: str, attempts: int) -> SetAside:
    """Records that a shard was given up, in the place of an earlier record."""
    entry = SetAside(
        reason=" ".join(reason.split())[:REASON_LENGTH],
        attempts=attempts,
        when=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        writer=f"{socket.gethostname()}:{os.getpid()}",
    )
    storage.put(_path(layer, shard), to_json_bytes(dataclasses.asdict(entry)))
    return entry


def read_set_aside(storage: Storage, layer: str) -> dict[int, SetAside]:
    """Reads why shards of a layer are missing, by shard, ascending; of those that are committed by now nothing.

    Returns:
        The first MOST. One whose record is malformed, or too long to be one, is UNREADABLE.
    """
    if not (names := _names(storage, layer)):
        return {}
    committed = read_index(storage, layer)
    shards = [shard for shard in map(_shard, names) if shard not in committed][:MOST]
    return {shard: entry for shard, entry in zip(shards, _read(storage, layer, shards), strict=True) if entry}


def explain_missing(storage: Storage, layer: str) -> str:
    """Returns why the first shard of a layer that was set aside was, as a clause to end a message with; "" for none."""
    found = read_set_aside(storage, layer)
    return "".join(f"; shard {shard} was set aside: {entry.reason}" for shard, entry in list(found.items())[:1])


def clear(storage: Storage, layer: str, shard: int) -> None:
    """Removes the record of a shard, if there is one."""
    storage.remove(_path(layer, shard))


def clear_committed(storage: Storage, layer: str) -> None:
    """Removes the records of all shards that are committed by now."""
    if names := _names(storage, layer):
        committed = read_index(storage, layer)
        storage.for_each(lambda shard: clear(storage, layer, shard), [s for s in map(_shard, names) if s in committed])


def _path(layer: str, shard: int) -> str:
    layer_arrays(layer)  # no other name becomes a path
    return f"{FOLDER}/{layer}/{shard:06d}.json"


def _names(storage: Storage, layer: str) -> list[str]:
    layer_arrays(layer)
    return sorted((name for name in storage.names(f"{FOLDER}/{layer}") if NAME.fullmatch(name)), key=_shard)


def _shard(name: str) -> int:
    return int(name.removesuffix(".json"))


def _read(storage: Storage, layer: str, shards: Sequence[int]) -> Iterator[SetAside | None]:
    for start in range(0, len(shards), AT_ONCE):
        paths = [_path(layer, shard) for shard in shards[start : start + AT_ONCE]]
        for path, data in zip(paths, storage.get_many(paths, [MAX_BYTES] * len(paths)), strict=True):
            yield None if data is None else _parsed(path, data)


def _parsed(path: str, data: bytes) -> SetAside:
    try:
        value: Any = parse_json(path, data) if len(data) <= MAX_BYTES else None
    except FormatError:
        return UNREADABLE
    kinds = {"reason": str, "attempts": int, "when": str, "writer": str}
    if not isinstance(value, dict) or {name: type(found) for name, found in value.items()} != kinds:
        return UNREADABLE
    return SetAside(**value | {"reason": value["reason"][:REASON_LENGTH]})
