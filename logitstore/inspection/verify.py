"""Verifies a store: reads all committed bytes and compares them with the commit records. Also repairs a store.

Other jobs may write to the store meanwhile, so every problem is checked a second time before it is reported.
"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from logitstore.errors import DamagedShardError, IdentityError, LayerNotFoundError
from logitstore.format import layout
from logitstore.format.commit import layer_digest, parse_commit, short_digest
from logitstore.inspection.metadata import Problem, check_metadata, write_anew
from logitstore.rows.shard_arrays import MAX_COMMIT_BYTES, Part, decode_layer, object_paths
from logitstore.rows.tokens import document_digests
from logitstore.store.catalog import runs, spans
from logitstore.store.commits.appends import FOLDER, pending_append
from logitstore.store.commits.index import commits_folder
from logitstore.store.reader import Store
from logitstore.store.take_back import give_up_append, sweep, take_back

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from logitstore.format.commit import Commit

T = TypeVar("T")
U = TypeVar("U")

PER_THREAD = 64
"""Number of shards per thread in one batch of work. Shards are submitted in batches, so that Ctrl-C has to wait only
for the shards of one batch, and the list of results stays short."""


def verify(
    store: Store,
    *,
    sample: float = 1.0,
    seed: int = 0,
    num_threads: int = 4,
    progress: Callable[[int], object] | None = None,
) -> list[Problem]:
    """Reads the committed shards of every layer, and lists the damaged and stale ones and all other problems.

    A shard is stale if the layer below it has changed since the shard was computed. Shards that are not committed yet,
    and documents of an unfinished append, are not problems.

    Args:
        store: The open store. Shards that were committed after the store was opened are not read.
        sample: Share of each layer's committed shards to read, above 0 and at most 1. At least one shard is read.
        seed: Seed of the random choice of the shards.
        num_threads: Number of shards read at the same time. A shard of 2**18 rows may take about 100 MB of memory.
        progress: Called with 1 after each shard of each layer, for a progress bar.

    Returns:
        The problems: first those outside the shards of the store, then those of the shards, in order of layer and
        shard. An empty list if the store is intact.

    Raises:
        ValueError: `sample` or `num_threads` is out of range.
        StorageError: The store cannot be reached, so its state is unknown.
    """
    check_num_threads(num_threads)
    # The store is opened again in two cases. First, if it was opened with a local cache: the cache may differ from the
    # bucket. Second, if it was opened with a smaller scheme than the stored one: it then shows no losses layers.
    if store.storage.cache is not None or store.spec != store.stored:
        store = Store(store.storage.without_cache())

    def check(place: tuple[str, int]) -> Problem | None:
        try:
            return check_shard(store, *place)
        finally:
            if progress is not None:
                progress(1)

    with ThreadPoolExecutor(num_threads) as pool:
        found = [*check_metadata(store), *_check_outside(store)]
        found += [p for p in _spread(pool, check, places(store, sample, seed), num_threads) if p is not None]
        if not found:
            return []
        # Other jobs may have changed the store meanwhile, so the problems are checked against its present state.
        now = Store(store.storage)
        general = {*check_metadata(now), *_check_outside(now)}

        def is_still(problem: Problem) -> bool:
            """Returns whether a problem still exists. Its shard may have been replaced or taken back meanwhile."""
            if problem in general:
                return True
            if problem.shard is None or problem.layer not in now.layers:
                return False
            index = now.layers[problem.layer].index.upto(now.spec.num_shards)
            return problem.shard in index and check_shard(now, problem.layer, problem.shard) is not None

        still = list(_spread(pool, is_still, found, num_threads))
    return [problem for problem, stays in zip(found, still, strict=True) if stays]


def check_num_threads(num_threads: int) -> None:
    """Raises ValueError if `num_threads` is below 1."""
    if num_threads < 1:
        raise ValueError(f"num_threads must be at least 1, got num_threads={num_threads}; 4 is usual")


def places(store: Store, sample: float = 1.0, seed: int = 0) -> list[tuple[str, int]]:
    """Lists the committed shards that `verify` reads, as pairs (layer, shard).

    Shards with numbers beyond the end of the store are left out.

    Args:
        store: The open store.
        sample: Share of each layer's committed shards, above 0 and at most 1. At least one shard is chosen.
        seed: Seed of the random choice of the shards.

    Raises:
        ValueError: `sample` is out of range.
    """
    if not 0.0 < sample <= 1.0:
        raise ValueError(f"sample must be above 0 and at most 1, got sample={sample}; 1 reads everything")
    rng = random.Random(seed)
    chosen: list[tuple[str, int]] = []
    for name, layer in store.layers.items():
        committed = layer.index.upto(store.spec.num_shards).shards.tolist()
        if committed and sample < 1.0:
            committed = sorted(rng.sample(committed, max(1, round(sample * len(committed)))))
        chosen += [(name, shard) for shard in committed]
    return chosen


def check_shard(store: Store, layer: str, shard: int) -> Problem | None:
    """Checks that one shard of a layer is intact, and that it fits the layers below, from which it was computed.

    Returns:
        The problem of the shard in this layer; None if the shard is intact. Problems of the layers below are not
        returned.
    """
    try:
        values = store.reader.read_layers(shard, layers=(layer,))
        store.reader.assemble(values)
        arrays, commit = values[layer]
        _check_digests(commit, arrays)
    except DamagedShardError as error:
        if error.layer == layer:
            return Problem(layer=layer, shard=shard, reason=error.reason)
    except (IdentityError, LayerNotFoundError):
        pass  # The error may come from this layer or from a layer below. `_check_alone` finds out which.
    else:
        return None
    return _check_alone(store, layer, shard)


def _check_alone(store: Store, layer: str, shard: int) -> Problem | None:
    """Compares a shard with its own commit record, without the values of the layer below.

    This check is used if the layer below is missing, damaged or changed.

    Returns:
        The problem: damage, values of another model, or stale values. None if the shard itself is intact.
    """
    try:
        commit = _record(store, layer, shard)
        data = store.storage.get_many(*object_paths(store.spec, Part(layer, shard)))
        _check_digests(commit, decode_layer(store.spec, commit, data))
        if commit.made_by != (made_by := store.layers[layer].made_by):
            raise DamagedShardError(layer, shard, f"values made by {commit.made_by[:19]}, not by {made_by[:19]}")
    except DamagedShardError as error:
        return Problem(layer=layer, shard=shard, reason=error.reason)
    if (below := layout.below(layer)) is None or shard not in store.layers[layer].stale:
        return None  # A problem of the layer below is found when that layer is checked.
    try:
        origin = _record(store, below, shard)
    except DamagedShardError:
        return None  # The damaged record below is found when that layer is checked.
    was, now = short_digest(commit.computed_from), short_digest(origin.digest)
    reason = f"stale values, computed from {below} {was}, but {below} is {now} now"
    return Problem(layer=layer, shard=shard, reason=reason)


def _record(store: Store, layer: str, shard: int) -> Commit:
    """Reads a shard's commit record without comparing it with the layer below.

    Raises:
        DamagedShardError: The shard has several commit records, or its record is missing, is malformed or does not
            match its file name.
    """
    index = store.layers[layer].index
    if (place := index.find(shard)) is None or shard in index.contested:
        raise DamagedShardError(layer, shard, "several commit records")
    name = index.name(place)
    (data,) = store.storage.get_many([f"{commits_folder(layer)}/{name}"], [MAX_COMMIT_BYTES])
    if data is None or len(data) > MAX_COMMIT_BYTES:
        what = "is listed but missing" if data is None else "is too long"
        raise DamagedShardError(layer, shard, f"a commit record that {what}")
    return parse_commit(data, layer, shard, name)


def _check_digests(commit: Commit, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Checks the digest of a shard and the digests of its documents. Readers skip these two checks.

    Raises:
        DamagedShardError: A digest differs.
    """
    if (digest := layer_digest(commit.layer, arrays)) != commit.digest:
        reason = f"values with digest {digest[:19]}, not {commit.digest[:19]}"
        raise DamagedShardError(commit.layer, commit.shard, reason)
    if commit.layer == "tokens":
        found = document_digests(arrays["ids"], arrays["loss_mask"], arrays["lengths"])
        if len(wrong := np.flatnonzero(found != arrays["digests"])):
            reason = f"{len(wrong)} documents that differ from their digests, the first of them document {wrong[0]}"
            raise DamagedShardError(commit.layer, commit.shard, reason)


def _check_outside(store: Store) -> Iterator[Problem]:
    """Yields problems of shards after the store's last one. Only an append that is under way may have such shards."""
    if pending_append(store.storage, store.spec.appends) is not None:
        return
    for name, layer in store.layers.items():
        outside = layer.index.shards[len(layer.index.upto(store.spec.num_shards)) :].tolist()
        found = [_check_alone(store, name, shard) for shard in outside]
        yield from (problem for problem in found if problem is not None)
        if intact := [shard for shard, problem in zip(outside, found, strict=True) if problem is None]:
            reason = (
                f"shards {spans(runs(intact))} are committed, but the store ends before shard {store.spec.num_shards}: "
                f"zarr.json was changed, or a file in {FOLDER}/ is missing; restore that file from a copy of the "
                "store, or run the dump with the --data of these documents and --append"
            )
            yield Problem(layer=name, shard=None, reason=reason)


def _spread(pool: ThreadPoolExecutor, action: Callable[[U], T], items: Sequence[U], num_threads: int) -> Iterator[T]:
    """Maps `action` over `items` in batches, and yields the results in order."""
    size = num_threads * PER_THREAD
    for start in range(0, len(items), size):
        yield from pool.map(action, items[start : start + size])


def repair(store: Store, problems: list[Problem]) -> list[str]:
    """Takes back damaged and stale shards, so that the next dump writes only these shards again.

    The commit records of these shards are removed; the stored values stay until a dump replaces them. Lost metadata is
    written again if it can be derived from the specs. An unfinished append is given up, and leftovers of killed
    writers are removed. No job should write to the store meanwhile. If a job does write, a second repair may be
    needed, but wrong values are never read.

    Args:
        store: The store that was verified.
        problems: The problems that `verify` found. Those whose `shard` and `path` are both None cannot be repaired.

    Returns:
        One line of text for each action.
    """
    storage = store.storage
    done = [
        f"{problem.layer}/{problem.shard}: uncommitted"
        for problem in problems
        if problem.shard is not None and take_back(storage, problem.layer, problem.shard)
    ]
    paths = {problem.path: problem.layer for problem in problems if problem.path is not None}
    # Damaged files are removed first, because `write_anew` does not replace existing files.
    for path in paths:
        storage.remove(path)
    for layer in dict.fromkeys(paths.values()):
        write_anew(store, layer)
    done += [f"{path}: {'written anew' if path.endswith('zarr.json') else 'removed'}" for path in paths]
    if (source := give_up_append(storage)) is not None:
        done.append(f"append of {source}: given up")
    if num_swept := sweep(storage):
        done.append(f"leftovers of killed writers: {num_swept} removed")
    return done
