"""Which commit record a shard of an open store has, and whether it belongs to what the store holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from logitstore import commits, layout, shards
from logitstore.errors import DamagedShardError, IdentityError, LayerNotFoundError

if TYPE_CHECKING:
    from logitstore.commits import Commit
    from logitstore.reader import Store


def path(store: Store, layer: str, shard: int) -> str:
    """Returns where the record of a shard is.

    Raises:
        LayerNotFoundError: The layer is not there, or the shard of it is not committed.
        DamagedShardError: There are several records.
    """
    if layer not in store.layers:
        raise LayerNotFoundError(
            f"layer must be one of {list(store.layers)} in {store.url}, got layer={layer}; dump it first"
        )
    index = store.layers[layer].index
    if (place := index.find(shard)) is None:
        if shard not in range(n := store.spec.num_shards):
            raise LayerNotFoundError(f"shard must be from 0 to {n - 1}, got shard={shard}; {store.url} has {n}")
        raise LayerNotFoundError(
            f"shard must be committed, got shard={shard} of layer {layer!r} in {store.url}, where "
            f"{len(index)} of {store.spec.num_shards} are; run the dump again to finish it"
        )
    if shard in index.contested:
        raise DamagedShardError(layer, shard, "several commit records")
    return f"{commits.folder(layer)}/{index.name(place)}"


def checked(store: Store, layer: str, shard: int, data: bytes | None) -> Commit:
    """Parses what was read at `path`, and checks that it belongs to the store's specs and to the layer below.

    Raises:
        LayerNotFoundError: There was nothing, or there is none of the layer below.
        DamagedShardError: It is no record, or not the one that its name says.
        IdentityError: It is of another model, or computed from something else, than the store holds now.
    """
    if data is None:
        raise LayerNotFoundError(
            f"shard must be committed, got shard={shard} of layer {layer!r} in {store.url}, which was taken back "
            "since the store was opened; open it again"
        )
    if len(data) > shards.MAX_COMMIT_BYTES:
        raise DamagedShardError(layer, shard, "a commit record too long to be one")
    commit = commits.parse(data, layer, shard, path(store, layer, shard).rpartition("/")[2])
    shards.check_room(store.stored, commit)
    way_out = {
        "tokens": "dump into another store",
        "target": "take the shard back with `logitstore verify --repair` and dump it again",
    }.get(layer, "dump the losses again, which replaces those that are stale")
    if commit.made_by != (now := store.layers[layer].made_by):
        raise IdentityError(
            f"shard {shard} of layer {layer!r} must be made by {now[:19]} as the layer's spec says, got "
            f"{commit.made_by[:19]}: another job wrote it; {way_out}"
        )
    below = layout.below(layer)
    if below is None:
        if commit.computed_from is not None:
            raise DamagedShardError(layer, shard, "tokens computed from something")
        return commit
    index = store.layers[below].index if below in store.layers else None
    if index is None or (place := index.find(shard)) is None:
        raise LayerNotFoundError(
            f"shard must be committed in {below}, got shard={shard} of layer {layer!r} in {store.url} without what "
            "it was computed from; run the dump again to finish it"
        )
    if shard in index.contested:
        raise DamagedShardError(below, shard, "several commit records")
    digest = index.digests[place]
    if commits.identity(commit.computed_from).encode() != digest:
        raise IdentityError(
            f"shard {shard} of layer {layer!r} must be computed from {below} {digest.decode()}, got "
            f"{commits.identity(commit.computed_from)}; these values are stale: {way_out}"
        )
    return commit
