"""The commit protocol: how one attempt's bytes, and only one's, become a shard of a layer (docs/format.md).

Any number of writers may work on one shard at once, be killed at any point, or finish long after they were given up.
Zarr's keys are fixed, so no writer puts there what it computed: each stages its bytes under names of its own, the first
to put a record at the winner's name wins, and all publish the winner's bytes. Until the shard is committed
nothing that was staged is removed, so there is one winner only; from then on nobody can win who would publish.
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
WINNER = "winner"
"""Begins the names of elections' results: winner-0.json, and if that became useless winner-1.json, and so on."""
MAX_ROUNDS = 100
"""Each round without an end means that another writer got further; so many in a row are not credible."""


@dataclass(frozen=True, kw_only=True)
class Winner:
    """Whose bytes a shard will have."""

    attempt: str
    objects: tuple[str, ...]
    """Arrays that have an object; the others hold the fill value alone."""
    commit: Commit


def staging(layer: str, shard: int) -> str:
    """Returns the folder of what is being written of a shard."""
    return f"{STAGING}/{layer}/{shard:06d}"


def publish(storage: Storage, commit: Commit, objects: Mapping[str, bytes | None]) -> Commit:
    """Makes a shard exist, or finds that it does.

    Args:
        storage: The store's root.
        commit: The record of these values.
        objects: The encoded values, by array; None where there is nothing but the fill value.

    Returns:
        The record that is committed now: this one, or that of a writer who was first.

    Raises:
        DamagedShardError: The shard has several records, or one that is not what its name says.
    """
    layer, shard = commit.layer, commit.shard
    staged = tuple(name for name, data in objects.items() if data is not None)
    for _ in range(MAX_ROUNDS):
        if (there := find_commit(storage, layer, shard)) is not None:
            clean(storage, layer, shard)
            return there
        # A new attempt each time: what is gone must not come back under a name that others gave up.
        mine = Winner(attempt=uuid.uuid4().hex, objects=staged, commit=commit)
        try:
            _stage(storage, mine, objects)
            winner = _elect(storage, mine)
            # Elections end with a commit: whoever won one that came after it sees the commit here, and stops.
            if winner is None or find_commit(storage, layer, shard) is not None:
                continue
            _copy(storage, winner)
        except FileNotFoundError:
            continue  # what was staged is gone: somebody has finished
        storage.put(f"{commits_folder(layer)}/{winner.commit.name}", commit_bytes(winner.commit))
        clean(storage, layer, shard)
        return winner.commit
    raise StorageError(
        f"shard {shard} of layer {layer!r} must be written by few writers at once, got {MAX_ROUNDS} rounds without an "
        "end; check that the file system shows what was written, then run the same command again"
    )


def clean(storage: Storage, layer: str, shard: int) -> None:
    """Removes all that was staged of a committed shard, whoever did it: the winner's name first."""
    folder = staging(layer, shard)
    names = storage.names(folder)
    # Without its objects a winner is no use, but others would have to find that out.
    storage.for_each(storage.remove, [f"{folder}/{name}" for name in names if name.startswith(WINNER)])
    if storage.is_local:
        storage.remove_folder(folder)  # with what killed writers did not finish
    else:
        storage.for_each(storage.remove, [f"{folder}/{name}" for name in names if not name.startswith(WINNER)])


def _stage(storage: Storage, mine: Winner, objects: Mapping[str, bytes | None]) -> None:
    folder = staging(mine.commit.layer, mine.commit.shard)
    pairs = [(f"{folder}/{mine.attempt}.{name}", data) for name, data in objects.items() if data is not None]
    storage.for_each(lambda pair: storage.put(*pair), pairs)


def _elect(storage: Storage, mine: Winner) -> Winner | None:
    """Returns who won, None if there is no winner any more: he has finished."""
    layer, shard = mine.commit.layer, mine.commit.shard
    folder = staging(layer, shard)
    record = {
        "attempt": mine.attempt,
        "objects": list(mine.objects),
        "name": mine.commit.name,
        "commit": commit_bytes(mine.commit).decode(),
    }
    # There is a second election only if the first one's winner is no use: damaged on the disk, or robbed of its objects
    # by somebody's hand. To replace it could be to replace what another writer, who saw the same, has just put there.
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
    if not isinstance(found, dict) or set(found) != {"attempt", "objects", "name", "commit"}:
        raise FormatError(f"winner must be one's record, got {found!r:.80}; remove it")
    attempt, objects, name, record = (found[field] for field in ("attempt", "objects", "name", "commit"))
    names = [array.name for array in layout.layer_arrays(commit.layer)]
    if not isinstance(objects, list) or not all(array in names for array in objects):
        raise FormatError(f"winner must name objects of {commit.layer}, got {objects!r:.80}; remove it")
    if not isinstance(attempt, str) or not re.fullmatch("[0-9a-f]{32}", attempt):
        raise FormatError(f"winner must name an attempt, got {attempt!r:.80}; remove it")
    if not isinstance(name, str) or not isinstance(record, str):
        raise FormatError(f"winner must hold a commit record as text, got {record!r:.80}; remove it")
    return Winner(
        attempt=attempt,
        objects=tuple(objects),
        commit=parse_commit(record.encode(errors="replace"), commit.layer, commit.shard, name),
    )


def _copy(storage: Storage, winner: Winner) -> None:
    """Gives the winner's bytes their Zarr keys. Copies, never writes: what is gone cannot be published any more."""
    layer, shard = winner.commit.layer, winner.commit.shard

    def place(array: ArraySpec) -> None:
        storage.copy(f"{staging(layer, shard)}/{winner.attempt}.{array.name}", layout.object_path(layer, array, shard))

    arrays = layout.layer_arrays(layer)
    storage.for_each(place, [array for array in arrays if array.name in winner.objects])
    # Not before the copies: who comes too late finds that out by them, and then removes nothing.
    absent = [layout.object_path(layer, array, shard) for array in arrays if array.name not in winner.objects]
    storage.for_each(storage.remove, absent)
