"""Takes back shards and appends: without a commit record they no longer exist."""

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
    """Uncommits a shard: removes its records, and what was staged for it and for what is computed from it.

    Returns:
        Whether there was a record.
    """
    names = commit_names(storage, layer, shard)
    storage.for_each(storage.remove, [f"{commits_folder(layer)}/{name}" for name in names])
    clean(storage, layer, shard)
    if layer in ("tokens", "target"):
        # Else the next writer would finish what another began with the values that were here.
        for name in ["target", *(f"losses/{name}" for name in storage.names(f"{STAGING}/losses"))]:
            clean(storage, name, shard)
    return bool(names)


def give_up_append(storage: Storage) -> str | None:
    """Removes what there is of an append that was not finished, or came too late.

    Shards that other layers were computed for stay: they belonged to the store, and what said so is gone.

    Returns:
        Of which documents, or None if no append was under way.
    """
    catalog = Catalog(storage)
    appends = catalog.spec.appends
    if (pending := pending_append(storage, appends) or late_claim(storage, appends)) is None:
        return None
    begun = {int(name) for name in storage.names(f"{STAGING}/tokens") if name.isdecimal()}
    computed = {shard for name, layer in catalog.layers.items() if name != "tokens" for shard in layer.committed}
    for shard in sorted((begun | catalog.layers["tokens"].committed) - computed):
        if shard >= catalog.spec.num_shards:
            take_back(storage, "tokens", shard)
    # Last: as long as the claim is there, nobody adds other documents to what is left.
    drop_claim(storage, pending.number)
    return "unknown documents" if pending.append is None else pending.append.data.source


def sweep(storage: Storage) -> int:
    """Removes what killed writers left that nobody looks for: staged values of committed shards, claims, half a file.

    Returns:
        Of how many shards and appends, and how many files.
    """
    catalog = Catalog(storage)
    claims = [f"{number:06d}.claim" for number in range(1, len(catalog.spec.appends) + 1)]
    left = sorted(set(claims).intersection(storage.names(FOLDER)))
    storage.for_each(storage.remove, [f"{FOLDER}/{name}" for name in left])
    swept = len(left)
    for name, layer in catalog.layers.items():
        for shard in [int(shard) for shard in storage.names(f"{STAGING}/{name}") if shard.isdecimal()]:
            if shard in layer.index:
                clean(storage, name, shard)
                swept += 1
        arrays = [f"{name}/{array.name}" for array in layout.layer_arrays(name)]
        swept += sum(map(storage.remove_partials, [commits_folder(name), name, *arrays]))
    return swept + sum(map(storage.remove_partials, ["", FOLDER]))
