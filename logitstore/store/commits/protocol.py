"""The commit protocol: of all attempts to write a shard, exactly one provides the shard's bytes (docs/format.md).

Any number of writers may work on one shard at the same time. A writer may be killed at any point, or finish long after
its job has stopped waiting for it. All writers of a shard share the shard's Zarr keys, so no writer puts its bytes
there directly:

1. Each writer stages its objects under names that no other writer uses.
2. The first writer that creates the winner file wins the election.
3. Every writer copies the winner's objects to the Zarr keys, then writes the winner's commit record.

Staged objects and the winner file stay until the shard is committed, so there is only one winner before the commit. A
writer that wins an election after the commit finds the commit record, and publishes nothing.
"""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING

from logitstore.errors import DamagedShardError, FormatError, StorageError
from logitstore.format import layout
from logitstore.format.commit import commit_bytes, parse_commit
from logitstore.format.strict_json import parse_json, to_json_bytes
from logitstore.store.commits.index import commits_folder, find_commit

if TYPE_CHECKING:
    from collections.abc import Mapping

    from logitstore.format.commit import Commit
    from logitstore.format.layout import ArraySpec
    from logitstore.storage.storage import Storage

STAGING = "staging"
"""Folder of the objects and winner files of shards that are being written."""
WINNER = "winner"
"""Beginning of a winner file's name. The file of a shard's first election is winner-0.json. If the winner that this
file names is unusable, another election is held with winner-1.json, and so on."""
MAX_ROUNDS = 100
"""Maximum number of rounds of `publish`, and of elections in one round. A round is repeated only if another writer made
progress meanwhile; 100 such rounds in a row are not plausible."""


@dataclass(frozen=True, kw_only=True)
class Winner:
    """An attempt to write a shard. The attempt is a candidate in the shard's election, or has won this election."""

    attempt: str
    """Random name of the attempt: 32 hexadecimal digits. The names of its staged objects begin with these digits."""
    objects: tuple[str, ...]
    """Names of the arrays that have a staged object. The other arrays hold only the fill value."""
    commit: Commit
    """The commit record of the attempt's values."""


def staging(layer: str, shard: int) -> str:
    """Returns the folder of the staged objects and winner files of a shard."""
    return f"{STAGING}/{layer}/{shard:06d}"


def publish(storage: Storage, commit: Commit, objects: Mapping[str, bytes | None]) -> Commit:
    """Commits a shard, unless another writer has committed it already.

    Args:
        storage: The store's root.
        commit: The commit record of the values in `objects`.
        objects: The encoded values, by array name; None for an array that holds only the fill value.

    Returns:
        The record that is committed now: `commit`, or the record of another writer's attempt if that attempt won.

    Raises:
        DamagedShardError: The shard has several records, or a record that does not match its file name.
        StorageError: The shard is not committed after MAX_ROUNDS rounds.
    """
    layer, shard = commit.layer, commit.shard
    staged = tuple(name for name, data in objects.items() if data is not None)
    for _ in range(MAX_ROUNDS):
        if (committed := find_commit(storage, layer, shard)) is not None:
            clean(storage, layer, shard)
            return committed
        # Each round uses a new attempt name. If the objects of the previous attempt were deleted, other writers may
        # have rejected that attempt. Objects must therefore not reappear under its name.
        mine = Winner(attempt=uuid.uuid4().hex, objects=staged, commit=commit)
        try:
            _stage(storage, mine, objects)
            winner = _elect(storage, mine)
            # Winner files are removed only after a commit. If this attempt won because these files were removed,
            # the commit record is found here, and nothing may be published.
            if winner is None or find_commit(storage, layer, shard) is not None:
                continue
            _copy(storage, winner)
        except FileNotFoundError:
            continue  # A staged object was removed, so another writer has finished.
        storage.put(f"{commits_folder(layer)}/{winner.commit.name}", commit_bytes(winner.commit))
        clean(storage, layer, shard)
        return winner.commit
    raise StorageError(
        f"shard {shard} of layer {layer!r} is not committed after {MAX_ROUNDS} rounds of the commit protocol; check "
        "that a finished write is visible to all machines at once, and that few jobs write this store, then run the "
        "same command again"
    )


def clean(storage: Storage, layer: str, shard: int) -> None:
    """Removes the winner files of a shard, then the staged objects of all its writers.

    Call this function only after the shard was committed or taken back.
    """
    folder = staging(layer, shard)
    names = storage.names(folder)
    # The winner files are removed first. A winner file without its objects would make other writers hold an election.
    storage.for_each(storage.remove, [f"{folder}/{name}" for name in names if name.startswith(WINNER)])
    if storage.is_local:
        storage.remove_folder(folder)  # Also removes the partial files of killed writers.
    else:
        storage.for_each(storage.remove, [f"{folder}/{name}" for name in names if not name.startswith(WINNER)])


def _stage(storage: Storage, mine: Winner, objects: Mapping[str, bytes | None]) -> None:
    """Writes the attempt's objects under names that no other attempt uses."""
    folder = staging(mine.commit.layer, mine.commit.shard)
    pairs = [(f"{folder}/{mine.attempt}.{name}", data) for name, data in objects.items() if data is not None]
    storage.for_each(lambda pair: storage.put(*pair), pairs)


def _elect(storage: Storage, mine: Winner) -> Winner | None:
    """Holds elections until a usable attempt has won. The bytes of that attempt become the shard.

    Returns:
        The winner, which may be `mine`. None if the winner file was removed because another writer has finished, or if
        the winners of all elections are unusable.
    """
    layer, shard = mine.commit.layer, mine.commit.shard
    folder = staging(layer, shard)
    record = {
        "attempt": mine.attempt,
        "objects": list(mine.objects),
        "name": mine.commit.name,
        "commit": commit_bytes(mine.commit).decode(),
    }
    # Another election is held only if the previous winner is unusable: its file is damaged, or its staged objects were
    # deleted. The winner file is not overwritten, because another writer may just have replaced it with a valid file.
    for number in range(MAX_ROUNDS):
        path = f"{folder}/{WINNER}-{number}.json"
        if storage.create(path, to_json_bytes(record)):
            return mine
        try:
            winner = _parse(parse_json(path, storage.get(path)), mine.commit)
        except FileNotFoundError:
            return None
        except (FormatError, DamagedShardError):
            continue
        staged = {f"{winner.attempt}.{name}" for name in winner.objects}
        if staged.issubset(storage.names_with(folder, winner.attempt)):
            return winner
    return None


def _parse(found: object, commit: Commit) -> Winner:
    """Builds a winner from the parsed content of a winner file. `commit` is the caller's record of the same shard.

    Raises:
        FormatError: The content is malformed.
        DamagedShardError: The commit record in the content is malformed, or belongs to another shard.
    """
    fields = found if isinstance(found, dict) else {}
    attempt, objects, name, record = (fields.get(field) for field in ("attempt", "objects", "name", "commit"))
    arrays = [array.name for array in layout.layer_arrays(commit.layer)]
    if (
        len(fields) != 4
        or not (isinstance(attempt, str) and re.fullmatch("[0-9a-f]{32}", attempt))
        or not (isinstance(objects, list) and all(array in arrays for array in objects))
        or not (isinstance(name, str) and isinstance(record, str))
    ):
        raise FormatError(
            f"winner file must hold an attempt and its commit record, got {found!r:.80}; delete that file"
        )
    # JSON allows lone surrogates, which cannot be encoded. They are replaced, and the record then fails its checksum.
    return Winner(
        attempt=attempt,
        objects=tuple(objects),
        commit=parse_commit(record.encode(errors="replace"), commit.layer, commit.shard, name),
    )


def _copy(storage: Storage, winner: Winner) -> None:
    """Copies the winner's objects to their Zarr keys, and deletes the keys of arrays without an object.

    The objects are copied from the staging folder, not written from memory. The staging folder is emptied once the
    shard is committed, so a writer that reaches this step later can publish nothing.

    Raises:
        FileNotFoundError: A staged object was removed.
    """
    layer, shard = winner.commit.layer, winner.commit.shard

    def place(array: ArraySpec) -> None:
        storage.copy(f"{staging(layer, shard)}/{winner.attempt}.{array.name}", layout.object_path(layer, array, shard))

    arrays = layout.layer_arrays(layer)
    storage.for_each(place, [array for array in arrays if array.name in winner.objects])
    # The copies are made first, so that a writer that reaches this step after the commit fails before it deletes keys.
    absent = [layout.object_path(layer, array, shard) for array in arrays if array.name not in winner.objects]
    storage.for_each(storage.remove, absent)
