"""Is a store intact? Reads every committed byte and compares it with its commit. And: taking back what is not.

A store may be written to while it is verified: what looks wrong is looked at again before it counts.
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
"""Shards that are handed out at once: what is under way can be stopped, and the lists stay short."""


def verify(
    store: Store,
    *,
    sample: float = 1.0,
    seed: int = 0,
    num_threads: int = 4,
    progress: Callable[[int], object] | None = None,
) -> list[Problem]:
    """Reads the committed shards of every layer and lists those that are not as committed, and what else is wrong.

    Shards that are not committed yet, and documents whose append was not finished, are no problems.

    Args:
        store: What to check, as it was when it was opened.
        sample: Share of each layer's shards to read, above 0 and at most 1. At least one shard is.
        seed: Which shards a sample holds.
        num_threads: Shards read at once. Each may take some 100 MB in shards of 2**18 rows.
        progress: Called after each shard of a layer with 1, for a progress bar.

    Returns:
        The problems: of no one shard first, then by layer and shard. Empty for an intact store.

    Raises:
        ValueError: The sample is no share, or there are no threads.
        StorageError: The store cannot be reached: nothing is known then.
    """
    check_num_threads(num_threads)
    # What this machine keeps says nothing about the store, nor does a smaller scheme that it is read by.
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
        now = Store(store.storage)
        general = {*check_metadata(now), *_check_outside(now)}

        def is_still(problem: Problem) -> bool:
            """Whether it was not taken back or written anew meanwhile."""
            if problem in general:
                return True
            if problem.shard is None or problem.layer not in now.layers:
                return False
            index = now.layers[problem.layer].index.upto(now.spec.num_shards)
            return problem.shard in index and check_shard(now, problem.layer, problem.shard) is not None

        still = list(_spread(pool, is_still, found, num_threads))
    return [problem for problem, stays in zip(found, still, strict=True) if stays]


def check_num_threads(num_threads: int) -> None:
    """Raises ValueError if `verify` cannot read with so many."""
    if num_threads < 1:
        raise ValueError(f"num_threads must be at least 1, got num_threads={num_threads}; 4 is usual")


def places(store: Store, sample: float = 1.0, seed: int = 0) -> list[tuple[str, int]]:
    """Lists the (layer, shard) pairs that `verify` reads: committed ones within the store's extent."""
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
    """Reads one shard of a layer, and all that its values must agree with."""
    try:
        values = store.reader.read_layers(shard, layers=(layer,))
        store.reader.assemble(values)
        arrays, commit = values[layer]
        _check_digests(commit, arrays)
    except DamagedShardError as error:
        if error.layer == layer:
            return Problem(layer=layer, shard=shard, reason=error.reason)
    except (IdentityError, LayerNotFoundError):
        pass  # of this layer, or of one below
    else:
        return None
    return _check_alone(store, layer, shard)


def _check_alone(store: Store, layer: str, shard: int) -> Problem | None:
    """Compares a shard with its own record only: what it was computed from is not there, or not as it should be."""
    try:
        commit = _record(store, layer, shard)
        data = store.storage.get_many(*object_paths(store.spec, Part(layer, shard)))
        _check_digests(commit, decode_layer(store.spec, commit, data))
        if commit.made_by != (made_by := store.layers[layer].made_by):
            raise DamagedShardError(layer, shard, f"values made by {commit.made_by[:19]}, not by {made_by[:19]}")
    except DamagedShardError as error:
        return Problem(layer=layer, shard=shard, reason=error.reason)
    if (below := layout.below(layer)) is None or shard not in store.layers[layer].stale:
        return None  # what is wrong below is found there
    try:
        origin = _record(store, below, shard)
    except DamagedShardError:
        return None
    was, now = short_digest(commit.computed_from), short_digest(origin.digest)
    return Problem(layer=layer, shard=shard, reason=f"stale values, computed from {below} {was}, which is {now} now")


def _record(store: Store, layer: str, shard: int) -> Commit:
    """Reads a shard's record as it is, whatever it was computed from."""
    index = store.layers[layer].index
    if (place := index.find(shard)) is None or shard in index.contested:
        raise DamagedShardError(layer, shard, "several commit records")
    name = index.name(place)
    (data,) = store.storage.get_many([f"{commits_folder(layer)}/{name}"], [MAX_COMMIT_BYTES])
    if data is None or len(data) > MAX_COMMIT_BYTES:
        what = "is listed but not there" if data is None else "is too long to be one"
        raise DamagedShardError(layer, shard, f"a commit record that {what}")
    return parse_commit(data, layer, shard, name)


def _check_digests(commit: Commit, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Checks what only `verify` computes: a shard's identity, and those of its documents."""
    if (digest := layer_digest(commit.layer, arrays)) != commit.digest:
        reason = f"values with digest {digest[:19]}, not {commit.digest[:19]}"
        raise DamagedShardError(commit.layer, commit.shard, reason)
    if commit.layer == "tokens":
        found = document_digests(arrays["ids"], arrays["loss_mask"], arrays["lengths"])
        if len(wrong := np.flatnonzero(found != arrays["digests"])):
            reason = f"{len(wrong)} documents that are not those of their digests, document {wrong[0]} the first"
            raise DamagedShardError(commit.layer, commit.shard, reason)


def _check_outside(store: Store) -> Iterator[Problem]:
    """Looks at shards behind the store's end, where only those of an append under way may be."""
    if pending_append(store.storage, store.spec.appends) is not None:
        return
    for name, layer in store.layers.items():
        outside = layer.index.shards[len(layer.index.upto(store.spec.num_shards)) :].tolist()
        found = [_check_alone(store, name, shard) for shard in outside]
        yield from (problem for problem in found if problem is not None)
        if intact := [shard for shard, problem in zip(outside, found, strict=True) if problem is None]:
            reason = (
                f"shards {spans(runs(intact))} are committed, but the store ends before shard {store.spec.num_shards}: "
                f"zarr.json was changed, or a file in {FOLDER}/ is gone; restore it from a copy of the store, or run "
                "the dump with the --data of these documents and --append"
            )
            yield Problem(layer=name, shard=None, reason=reason)


def _spread(pool: ThreadPoolExecutor, action: Callable[[U], T], items: Sequence[U], num_threads: int) -> Iterator[T]:
    size = num_threads * PER_THREAD
    for start in range(0, len(items), size):
        yield from pool.map(action, items[start : start + size])


def repair(store: Store, problems: list[Problem]) -> list[str]:
    """Takes back what is damaged or stale, so that the next dump writes it anew, and that alone.

    Removes commit records, writes lost metadata anew where it follows from the rest, gives up an append that was not
    finished, and clears what killed writers left. Values stay where they are until they are replaced. No writer should
    be at work meanwhile; if one is, the worst is more of the same work.

    Args:
        store: The store that was verified.
        problems: What `verify` found. Those with neither a shard nor a path stay.

    Returns:
        What was done, in words.
    """
    storage = store.storage
    done = [
        f"{problem.layer}/{problem.shard}: uncommitted"
        for problem in problems
        if problem.shard is not None and take_back(storage, problem.layer, problem.shard)
    ]
    paths = {problem.path: problem.layer for problem in problems if problem.path is not None}
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
