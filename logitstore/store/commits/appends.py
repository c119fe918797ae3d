"""Appends: documents added to a finished store, in new shards.

The new shards exist for readers as soon as the record of the append is written to the folder appends/. While the shards
are written, a claim (a file in the same folder) keeps other jobs from appending.
"""

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
"""Folder of the records and claims of appends."""
NAME = re.compile(r"[0-9]{6}\.json")
"""Pattern of the file name of an append's record: the number of the append, starting at 000001."""
MAX_APPENDS = 10_000
"""Maximum number of appends of a store. The number is limited because every reader reads the records of all appends."""
MAX_APPEND_BYTES = 2**16
"""Maximum size of the record of an append, in bytes."""
READ_AT_ONCE = 100
"""Maximum number of records that are requested together."""


def read_appends(storage: Storage, spec: StoreSpec) -> tuple[Append, ...]:
    """Reads the appends of a store, in order, up to the first missing number.

    Args:
        storage: The store's root.
        spec: The spec that is stored in the root group. Its `num_shards` does not include appended shards.

    Raises:
        FormatError: A record is malformed or too long, an append does not begin at the shard at which the previous
            append ends, or the store has more than MAX_APPENDS appends.
    """
    found = set(storage.names(FOLDER))
    # An append begins where the append before it ends, so records after a missing number cannot be used.
    names = list(itertools.takewhile(found.__contains__, (f"{number:06d}.json" for number in itertools.count(1))))
    if len(names) > MAX_APPENDS:
        raise FormatError(
            f"a store must have at most {MAX_APPENDS} appends, got {len(names)}; logitstore did not write this folder"
        )
    paths = [f"{FOLDER}/{name}" for name in names]
    appends = []
    end = spec.num_shards
    for path, data in zip(paths, _read(storage, paths), strict=False):
        if data is None:
            break  # The record was removed after the listing, so the result ends before this append.
        if len(data) > MAX_APPEND_BYTES:
            raise FormatError(f"{path} must have at most {MAX_APPEND_BYTES} bytes, got more; {FROM_A_COPY}")
        # Each append must follow the shards before it without a gap, so that every shard belongs to at most one append.
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
    """Publishes an append, so that its shards exist for readers. The tokens of these shards must already be committed.

    Args:
        storage: The store's root.
        number: Number of the append, from 1.
        append: The append.

    Returns:
        Whether this call published the append. False if a record with this number existed before. That record may
        describe the same append.
    """
    return storage.create(f"{FOLDER}/{number:06d}.json", to_json_bytes(dataclasses.asdict(append)))


def claim(storage: Storage, number: int, append: Append) -> Append | None:
    """Claims the next append. If two jobs start an append at the same time, only one of them may continue.

    The caller must read the appends again after this call. If an append of this number was published before the claim,
    the claim has no effect.

    Args:
        storage: The store's root.
        number: Number of the append, from 1.
        append: The append that the caller wants to write.

    Returns:
        The append that holds the claim now: `append`, or the append of an earlier claim, which is under way or was left
        unfinished. None if an earlier claim was removed during this call.

    Raises:
        FormatError: The earlier claim is malformed.
    """
    path = f"{FOLDER}/{number:06d}.claim"
    if storage.create(path, to_json_bytes(dataclasses.asdict(append))):
        return append
    try:
        return from_json(Append, storage.get_json(path), path)
    except FileNotFoundError:  # The earlier append was published or given up.
        return None


@dataclass(frozen=True, kw_only=True)
class Pending:
    """An append that is under way, or was left unfinished."""

    number: int
    """Number of the append, from 1."""
    append: Append | None
    """The claimed append; None if the claim cannot be read."""


def pending_append(storage: Storage, appends: tuple[Append, ...]) -> Pending | None:
    """Returns the append that has claimed the number after the published `appends`; None if there is no such claim."""
    number = len(appends) + 1
    path = f"{FOLDER}/{number:06d}.claim"
    try:
        return Pending(number=number, append=from_json(Append, storage.get_json(path), path))
    except FileNotFoundError:
        return None
    except FormatError:
        # A claim that cannot be read still blocks new appends, so `give_up_append` must be able to find such a claim.
        return Pending(number=number, append=None)


def late_claim(storage: Storage, appends: tuple[Append, ...]) -> Pending | None:
    """Returns a claimed append that can no longer be published; None if no such claim exists.

    An append can no longer be published if another job has published an append with the same number and other
    documents.

    Args:
        storage: The store's root.
        appends: The published appends.
    """
    published = {append.data.documents for append in appends}
    names = set(storage.names(FOLDER))
    for number in range(len(appends), 0, -1):
        path = f"{FOLDER}/{number:06d}.claim"
        try:
            late = from_json(Append, storage.get_json(path), path) if path.rpartition("/")[2] in names else None
        except (FileNotFoundError, FormatError):
            continue
        # If the claimed append itself was published, its claim is only a leftover, which `take_back.sweep` removes.
        if late is not None and late.data.documents not in published:
            return Pending(number=number, append=late)
    return None


def stray_appends(storage: Storage, appends: tuple[Append, ...]) -> list[str]:
    """Lists the names of append records that readers ignore, because a record with a lower number is missing."""
    names = [name for name in storage.names(FOLDER) if NAME.fullmatch(name)]
    return [name for name in names if not 1 <= int(name.removesuffix(".json")) <= len(appends)]


def drop_claim(storage: Storage, number: int) -> bool:
    """Removes the claim of an append that was published or given up. Returns whether the claim existed."""
    name = f"{number:06d}.claim"
    existed = name in storage.names(FOLDER)
    storage.remove(f"{FOLDER}/{name}")
    return existed


def joined(spec: StoreSpec, appends: tuple[Append, ...]) -> StoreSpec:
    """Returns the store's spec with the given appends. The returned `num_shards` includes the shards of the appends."""
    return dataclasses.replace(spec, appends=appends, num_shards=spec.num_shards + sum(a.num_shards for a in appends))


def check_end(storage: Storage, spec: StoreSpec, tokens: Index) -> None:
    """Checks that no tokens are committed after the store's last shard, unless an append is under way.

    Such tokens mean that the metadata covers fewer shards than were written. Without this check, a reader would
    silently ignore the documents in the shards that the metadata does not cover.

    Args:
        storage: The store's root.
        spec: The spec of the opened store, including its appends.
        tokens: Index of the tokens. Its listing must have been made after the appends were read.

    Raises:
        FormatError: Tokens are committed after the store's last shard, and the next append is neither claimed nor
            published.
    """
    if not (behind := len(tokens) - len(tokens.upto(spec.num_shards))):
        return
    number = len(spec.appends) + 1
    # The next append may be under way, or may have been published since the appends were read.
    if {f"{number:06d}.claim", f"{number:06d}.json"}.isdisjoint(storage.names(FOLDER)):
        raise FormatError(
            f"store {storage.url} ends before shard {spec.num_shards}, but {behind} committed shards of tokens lie "
            f"after its end: zarr.json was changed, or a file in {FOLDER}/ is missing; restore that file from a copy "
            "of the store, or run the dump with the --data of these documents and --append"
        )
