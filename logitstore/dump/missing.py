"""What a dump has to do in a store, and what it left undone. Knows no Ray and no model."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from logitstore.errors import DamagedShardError, IdentityError
from logitstore.format.commit import parse_commit
from logitstore.format.spec import LossSpec, TargetSpec, maker
from logitstore.rows.shard_arrays import MAX_COMMIT_BYTES
from logitstore.store.catalog import read_attributes, stored_spec
from logitstore.store.commits.index import commits_folder
from logitstore.store.commits.set_aside import read_set_aside

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from logitstore.format.commit import Commit
    from logitstore.storage.storage import Storage
    from logitstore.store.catalog import Layer
    from logitstore.store.reader import Store

FIRST_COMMITS = 256
"""Of each layer: whose they are is looked at before a dump goes on. More than any job writes within a second or two."""
MOST_NAMED = 1000
"""Documents set aside whose reasons are read, of each layer."""
READ_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True)
class Todo:
    """The shards to dump."""

    layers: tuple[str, ...]
    """That are wanted, target first. Which of them a shard lacks is seen when its turn comes."""
    shards: dict[int, tuple[str, ...]]
    """Those that lack something, ascending; and names of commit records that are to give way to another try."""
    stale: dict[str, list[int]]
    """Those of them whose values were computed from others than there are now, by layer."""
    retried: dict[str, list[int]]
    """Those of them with documents to be tried again, by layer."""
    failed_before: frozenset[int]
    """Those of them that another run set aside."""


def check_makers(storage: Storage, made_by: Mapping[str, str]) -> None:
    """Checks that layers are as they were when they were added.

    Args:
        storage: The store's root.
        made_by: Digests of their specs, by layer.

    Raises:
        IdentityError: One is another's by now, or gone.
    """
    for layer, wanted in made_by.items():
        attributes = read_attributes(storage, layer)
        kind = TargetSpec if layer == "target" else LossSpec
        found = "none" if attributes is None else maker(stored_spec(kind, attributes, layer))
        if found != wanted:
            raise IdentityError(
                f"layer {layer!r} must be made by {wanted[:19]} in {storage.url}, got {found[:19]}: another job began "
                "it anew with another model; stop one of them"
            )


def find_todo(store: Store, layers: Sequence[str], *, retry_set_aside: bool) -> Todo:
    """Finds what some layers lack, within the store's extent.

    Args:
        store: As it is now.
        layers: Wanted ones, target first.
        retry_set_aside: Whether shards with documents set aside are to be dumped again.
    """
    wanted: dict[int, list[str]] = {}
    stale: dict[str, list[int]] = {}
    retried: dict[str, list[int]] = {}
    failed_before: set[int] = set()
    for name in layers:
        layer = store.layers[name]
        if found := sorted(shard for shard in layer.stale if shard < store.num_shards):
            stale[name] = found
        missing = itertools.chain.from_iterable(range(gap.start, min(gap.stop, store.num_shards)) for gap in layer.gaps)
        for shard in itertools.chain(missing, found, _of_others(store, layer)):
            wanted.setdefault(shard, [])
        index = layer.index.upto(store.num_shards)
        places = np.flatnonzero(index.set_aside).tolist() if retry_set_aside else []
        for place in places:
            wanted.setdefault(int(index.shards[place]), []).append(index.name(place))
        if places:
            retried[name] = index.shards[places].tolist()
        failed_before.update(read_set_aside(store.storage, name))
    return Todo(
        layers=tuple(layers),
        shards={shard: tuple(wanted[shard]) for shard in sorted(wanted)},
        stale=stale,
        retried=retried,
        failed_before=frozenset(failed_before.intersection(wanted)),
    )


def _of_others(store: Store, layer: Layer) -> Iterator[int]:
    """Finds shards that another model's job committed while this layer was begun anew: it had nothing then."""
    for commit in _read_commits(store, layer, np.arange(min(FIRST_COMMITS, len(layer.index.upto(store.num_shards))))):
        if commit.made_by != layer.made_by:
            yield commit.shard


def documents_set_aside(store: Store, layer: Layer) -> dict[int, str]:
    """Reads why documents could not be computed, by number in the store: of the first MOST_NAMED."""
    index = layer.index.upto(store.num_shards)
    first = np.concatenate([[0], np.cumsum(store.layers["tokens"].index.documents)])
    named: dict[int, str] = {}
    for commit in _read_commits(store, layer, np.flatnonzero(index.set_aside)):
        named |= {int(first[commit.shard]) + i: reason for i, reason in sorted(commit.set_aside.items())}
        if len(named) >= MOST_NAMED:
            break
    return dict(list(named.items())[:MOST_NAMED])


def _read_commits(store: Store, layer: Layer, places: NDArray[np.intp]) -> Iterator[Commit]:
    """Reads records as they are, some at once; those that are damaged or gone are others' business."""
    for start in range(0, len(places), READ_AT_ONCE):
        some = [(int(layer.index.shards[place]), layer.index.name(place)) for place in places[start:][:READ_AT_ONCE]]
        paths = [f"{commits_folder(layer.name)}/{name}" for _, name in some]
        found = store.storage.get_many(paths, [MAX_COMMIT_BYTES] * len(paths))
        for (shard, name), data in zip(some, found, strict=True):
            if data is not None and len(data) <= MAX_COMMIT_BYTES:
                try:
                    yield parse_commit(data, layer.name, shard, name)
                except DamagedShardError:
                    continue
