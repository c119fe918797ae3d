"""Documents added to a finished store. A record in appends/ makes all the new shards of one append exist at once."""

from __future__ import annotations

import dataclasses
import itertools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from logitstore.errors import FormatError
from logitstore.format.spec import MAX_SHARDS, Append, from_json
from logitstore.format.strict_json import FROM_A_COPY, parse_json, to_json_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from logitstore.format.spec import StoreSpec
    from logitstore.storage.storage import Storage
    from logitstore.store.commits.index import Index

FOLDER = "appends"
NAME = re.compile(r"[0-9]{6}\.json")
MAX_APPENDS = 10_000
"""A reader reads them all."""
MAX_APPEND_BYTES = 2**16
READ_AT_ONCE = 100


def read_appends(storage: Storage, spec: StoreSpec) -> tuple[Append, ...]:
    """Reads the appends of a store, in order, up to the first number that is missing.

    Args:
        storage: The store's root.
        spec: The root's spec, with the shards that the store began with.

    Raises:
        FormatError: One is malformed, or does not begin where the store ended before it.
    """
    there = set(storage.names(FOLDER))
    names = list(itertools.takewhile(there.__contains__, (f"{number:06d}.json" for number in itertools.count(1))))
    if len(names) > MAX_APPENDS:
        raise FormatError(f"appends must be at most {MAX_APPENDS}, got {len(names)}; this is no store of this format")
    paths = [f"{FOLDER}/{name}" for name in names]
    appends = []
    end = spec.num_shards
    for path, data in zip(paths, _read(storage, paths), strict=False):
        if data is None:
            break
        if len(data) > MAX_APPEND_BYTES:
            raise FormatError(f"{path} must be of at most {MAX_APPEND_BYTES} bytes, got more; this is no append")
        append = from_json(Append, parse_json(path, data), path)
        if append.first_shard != end or end + append.num_shards > MAX_SHARDS:
            raise FormatError(f"{path} must begin at shard {end}, got first_shard={append.first_shard}; "
                              "restore it from a copy of the store")  # fmt: skip
        appends.append(append)
        end += append.num_shards
    return tuple(appends)


def _read(storage: Storage, paths: Sequence[str]) -> Iterator[bytes | None]:
    for start in range(0, len(paths), READ_AT_ONCE):
        some = paths[start : start + READ_AT_ONCE]
        yield from storage.get_many(some, [MAX_APPEND_BYTES] * len(some))


def write_append(storage: Storage, number: int, append: Append) -> bool:
    """Makes appended shards exist. Their tokens must have been committed before.

    Returns:
        False if there is an append of this number already, which may be the same.
    """
    return storage.create(f"{FOLDER}/{number:06d}.json", to_json_bytes(dataclasses.asdict(append)))


def claim(storage: Storage, number: int, append: Append) -> Append | None:
    """Claims the next append: of two that begin at once, only one may go on.

    Look afterwards whether the append was published: if it was, a claim of its number means nothing.

    Returns:
        Whose claim holds now: this one, or an earlier one that is under way or was left. None if that is gone just now.
    """
    path = f"{FOLDER}/{number:06d}.claim"
    if storage.create(path, to_json_bytes(dataclasses.asdict(append))):
        return append
    try:
        return from_json(Append, storage.get_json(path), path)
    except FileNotFoundError:  # it was published, or given up
        return None


@dataclass(frozen=True, kw_only=True)
class Pending:
    """An append that is under way, or was left unfinished."""

    number: int
    append: Append | None
    """None: its claim cannot be read."""


def pending_append(storage: Storage, appends: tuple[Append, ...]) -> Pending | None:
    """Looks whether there is a claim of the next append."""
    number = len(appends) + 1
    path = f"{FOLDER}/{number:06d}.claim"
    try:
        return Pending(number=number, append=from_json(Append, storage.get_json(path), path))
    except FileNotFoundError:
        return None
    except FormatError:
        return Pending(number=number, append=None)


def late_claim(storage: Storage, appends: tuple[Append, ...]) -> Pending | None:
    """Looks whether there is a claim of an append that was published with other documents: who made it was too late."""
    there = {append.data.documents for append in appends}
    names = set(storage.names(FOLDER))
    for number in range(len(appends), 0, -1):
        path = f"{FOLDER}/{number:06d}.claim"
        try:
            late = from_json(Append, storage.get_json(path), path) if path.rpartition("/")[2] in names else None
        except (FileNotFoundError, FormatError):
            continue
        if late is not None and late.data.documents not in there:
            return Pending(number=number, append=late)
    return None


def stray_appends(storage: Storage, appends: tuple[Append, ...]) -> list[str]:
    """Lists the records of appends that no reader heeds, because one before them is not there."""
    names = [name for name in storage.names(FOLDER) if NAME.fullmatch(name)]
    return [name for name in names if not 1 <= int(name.removesuffix(".json")) <= len(appends)]


def drop_claim(storage: Storage, number: int) -> bool:
    """Removes the claim of an append that is finished, or is given up. Returns whether there was one."""
    name = f"{number:06d}.claim"
    there = name in storage.names(FOLDER)
    storage.remove(f"{FOLDER}/{name}")
    return there


def joined(spec: StoreSpec, appends: tuple[Append, ...]) -> StoreSpec:
    """Returns the spec of the store with what was appended."""
    return dataclasses.replace(spec, appends=appends, num_shards=spec.num_shards + sum(a.num_shards for a in appends))


def check_end(storage: Storage, spec: StoreSpec, tokens: Index) -> None:
    """Checks that no documents lie behind a store's end but those of an append: it must not end early unnoticed.

    Args:
        storage: The store's root.
        spec: What a reader has, with the appends that it saw.
        tokens: Shards of tokens that it saw after that.

    Raises:
        FormatError: Some do.
    """
    if not (behind := len(tokens) - len(tokens.upto(spec.num_shards))):
        return
    number = len(spec.appends) + 1
    if {f"{number:06d}.claim", f"{number:06d}.json"}.isdisjoint(storage.names(FOLDER)):
        raise FormatError(
            f"store must hold all shards that are committed, got {storage.url} that ends before shard "
            f"{spec.num_shards} with {behind} behind it: zarr.json was changed, or a file in {FOLDER}/ is gone; "
            f"{FROM_A_COPY}, or run the dump with the --data of these documents and --append"
        )
