"""Finds the shards that a dump has to compute, and the documents that were set aside. Uses no Ray and no model."""

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
"""Number of commit records in each layer that a dump checks at its start to find shards that another model made. A job
whose layer was replaced stops within one or two seconds. In that time, it commits fewer than FIRST_COMMITS shards."""
MOST_NAMED = 1000
"""Maximum number of documents in each layer for which a dump reads the reason for setting them aside."""
READ_AT_ONCE = 64
"""Number of commit records read in parallel."""


@dataclass(frozen=True, kw_only=True)
class Todo:
    """The shards that a dump has to compute."""

    layers: tuple[str, ...]
    """Layers to fill, with `target` first. The actor that gets a shard checks which of these layers the shard lacks."""
    shards: dict[int, tuple[str, ...]]
    """The keys are the numbers of the shards to compute, in ascending order. The value holds the names of the shard's
    commit records that set documents aside, if these documents are tried again; otherwise the value is empty."""
    stale: dict[str, list[int]]
    """Stale shards in `shards`, by layer. A stale shard was computed from values that the store no longer holds."""
    retried: dict[str, list[int]]
    """For each layer, the shards in `shards` that are tried again because documents were set aside in them."""
    failed_before: frozenset[int]
    """Shards in `shards` that an earlier dump set aside."""


def check_makers(storage: Storage, made_by: Mapping[str, str]) -> None:
    """Checks that no job has given a layer another spec since the layer was added.

    Args:
        storage: Root of the store.
        made_by: For each layer, the digest of the spec that the layer had when it was added.

    Raises:
        IdentityError: Another job gave a layer another spec, or the layer no longer exists.
    """
    for layer, wanted in made_by.items():
        attributes = read_attributes(storage, layer)
        kind = TargetSpec if layer == "target" else LossSpec
        found = "none" if attributes is None else maker(stored_spec(kind, attributes, layer))
        if found != wanted:
            raise IdentityError(
                f"another job replaced layer {layer!r} in {storage.url}, and uses another model ({found[:19]} instead "
                f"of {wanted[:19]}); stop one of the two jobs"
            )


def find_todo(store: Store, layers: Sequence[str], *, retry_set_aside: bool) -> Todo:
    """Finds the shards in which at least one of the given layers is missing, stale or made by another model.

    Args:
        store: A store that was opened just before the call.
        layers: Layers to fill, with `target` first.
        retry_set_aside: Whether to include shards in which documents were set aside.
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
    """Finds committed shards of a layer that were made by another model.

    A job may replace the spec of a layer only while the layer has no commits. The job that worked with the earlier spec
    may still commit a few shards after the replacement, before it stops. Only the first commit records of a layer can
    come from such a job.
    """
    for commit in _read_commits(store, layer, np.arange(min(FIRST_COMMITS, len(layer.index.upto(store.num_shards))))):
        if commit.made_by != layer.made_by:
            yield commit.shard


def documents_set_aside(store: Store, layer: Layer) -> dict[int, str]:
    """Reads the reasons why documents of a layer were set aside.

    Args:
        store: The store.
        layer: A layer of the store.

    Returns:
        The reason for each of the first MOST_NAMED documents that were set aside. The keys are the numbers of the
        documents in the store.
    """
    index = layer.index.upto(store.num_shards)
    # Commit records number the documents within their shard. `first` is the number, in the store, of the first document
    # of each shard.
    first = np.concatenate([[0], np.cumsum(store.layers["tokens"].index.documents)])
    named: dict[int, str] = {}
    for commit in _read_commits(store, layer, np.flatnonzero(index.set_aside)):
        named |= {int(first[commit.shard]) + i: reason for i, reason in sorted(commit.set_aside.items())}
        if len(named) >= MOST_NAMED:
            break
    return dict(list(named.items())[:MOST_NAMED])


def _read_commits(store: Store, layer: Layer, places: NDArray[np.intp]) -> Iterator[Commit]:
    """Reads commit records of a layer, several in parallel. Skips records that are damaged or no longer exist.

    The dump need not stop at a damaged commit record, because `verify` reports it.
    """
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
