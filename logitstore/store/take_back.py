"""Takes back shards and appends: removes their records, so that they no longer exist for readers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from logitstore.format import layout
from logitstore.store.catalog import Catalog
from logitstore.store.commits.appends import FOLDER, drop_claim, late_claim, pending_append
from logitstore.store.commits.index import commit_names, commits_folder
from logitstore.store.commits.protocol import STAGING, clean

if TYPE_CHECKING:
    from logitstore.storage.storage import Storage


def take_back(storage: Storage, layer: str, shard: int) -> bool:
    """Uncommits a shard: removes its commit records and all objects that are staged for it.

    Objects that are staged for the same shard of the layers above are removed too. The values of the shard stay in the
    store until a writer replaces them.

    Args:
        storage: The store's root.
        layer: The shard's layer.
        shard: The shard's number.

    Returns:
        Whether the shard had a commit record.
    """
    names = commit_names(storage, layer, shard)
    storage.for_each(storage.remove, [f"{commits_folder(layer)}/{name}" for name in names])
    clean(storage, layer, shard)
    if layer in ("tokens", "target"):
        # A writer of a layer above may have staged values that it computed from this shard. If these values stayed, the
        # next writer would publish them although they are stale.
        for name in ["target", *(f"losses/{name}" for name in storage.names(f"{STAGING}/losses"))]:
            clean(storage, name, shard)
    return bool(names)


def give_up_append(storage: Storage) -> str | None:
    """Removes the shards and the claim of an append that was not published.

    An append stays unpublished if its writer was stopped, or if another append with the same number was published
    first.

    Shards that have values in other layers are kept. Such shards once belonged to the store, so the record of their
    append must have been lost.

    Args:
        storage: The store's root.

    Returns:
        Name of the data that the append was made from, or "unknown documents" if the claim cannot be read; None if
        there was no such append.
    """
    catalog = Catalog(storage)
    appends = catalog.spec.appends
    if (pending := pending_append(storage, appends) or late_claim(storage, appends)) is None:
        return None
    # A killed writer may have staged shards that it did not commit.
    begun = {int(name) for name in storage.names(f"{STAGING}/tokens") if name.isdecimal()}
    computed = {shard for name, layer in catalog.layers.items() if name != "tokens" for shard in layer.committed}
    for shard in sorted((begun | catalog.layers["tokens"].committed) - computed):
        if shard >= catalog.spec.num_shards:
            take_back(storage, "tokens", shard)
    # The claim is removed last. While the claim exists, no other job starts an append that would include these shards.
    drop_claim(storage, pending.number)
    return "unknown documents" if pending.append is None else pending.append.data.source


def sweep(storage: Storage) -> int:
    """Removes those leftovers of killed writers that no other step removes.

    These are the staged objects of committed shards, the claims of published appends, and partial files on a local
    disk that are at least a day old.

    Args:
        storage: The store's root.

    Returns:
        Number of removed leftovers: claims, partial files, and shards whose staged objects were removed.
    """
    catalog = Catalog(storage)
    claims = [f"{number:06d}.claim" for number in range(1, len(catalog.spec.appends) + 1)]
    left = sorted(set(claims).intersection(storage.names(FOLDER)))
    storage.for_each(storage.remove, [f"{FOLDER}/{name}" for name in left])
    swept = len(left)
    for name, layer in catalog.layers.items():
        for shard in [int(shard) for shard in storage.names(f"{STAGING}/{name}") if shard.isdecimal()]:
            # The staged objects of other shards may belong to a writer that is still at work.
            if shard in layer.index:
                clean(storage, name, shard)
                swept += 1
        arrays = [f"{name}/{array.name}" for array in layout.layer_arrays(name)]
        swept += sum(map(storage.remove_partials, [commits_folder(name), name, *arrays]))
    return swept + sum(map(storage.remove_partials, ["", FOLDER]))
