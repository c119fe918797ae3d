"""What a store holds besides shards: groups, arrays' zarr.json, names of records, appends. Is it as it must be?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from logitstore.errors import FormatError
from logitstore.format import layout, zarr_objects
from logitstore.format.strict_json import parse_json
from logitstore.rows.shard_arrays import entries_per_row
from logitstore.store.catalog import read_attributes
from logitstore.store.commits.appends import FOLDER, stray_appends
from logitstore.store.commits.index import commits_folder, read_index
from logitstore.store.writer import make_room

if TYPE_CHECKING:
    from collections.abc import Iterator

    from logitstore.store.reader import Store


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One damaged or stale shard of a layer, or something else in it that is not as it should be."""

    layer: str
    shard: int | None
    """None: not of one shard."""
    reason: str
    path: str | None = None
    """Of what is not of one shard: an object that can be removed, and written anew where there must be one."""

    def __str__(self) -> str:
        return f"{self.layer}{'' if self.shard is None else f'/{self.shard}'}: {self.reason}"


def check_metadata(store: Store) -> Iterator[Problem]:
    """Lists what is wrong with a store besides its shards."""
    for layer in store.layers:
        yield from _check_names(store, layer)
        if not len(store.layers[layer].index):
            continue  # it may be in the making
        if (path := plain_group(layer)) is not None and (reason := _group_problem(store, path)) is not None:
            yield Problem(layer=layer, shard=None, reason=reason, path=path)
        for array in layout.layer_arrays(layer):
            if (reason := _array_problem(store, layer, array)) is not None:
                path = f"{layer}/{array.name}/zarr.json"
                yield Problem(layer=layer, shard=None, reason=f"{path} {reason}", path=path)
    yield from _check_unseen(store)
    for name in stray_appends(store.storage, store.spec.appends):
        reason = (
            f"{FOLDER}/{name} is there without the one before, so that nobody sees its documents; restore that from a "
            "copy of the store, or run the dump with its --data and --append"
        )
        yield Problem(layer="tokens", shard=None, reason=reason)


def write_anew(store: Store, layer: str) -> None:
    """Writes what is missing of the metadata of a layer whose spec is there."""
    if (path := plain_group(layer)) is not None:
        store.storage.create(path, zarr_objects.group_metadata({}))
    make_room(store.storage, store.spec, layer)


def plain_group(layer: str) -> str | None:
    """Returns the zarr.json of a layer's group that says nothing but that it is one; None where there is none."""
    return {"tokens": "tokens/zarr.json", "target": None}.get(layer, "losses/zarr.json")


def _check_names(store: Store, layer: str) -> Iterator[Problem]:
    """Names that look like those of records and are none."""
    for name in store.layers[layer].index.unknown:
        if name.endswith(".json"):
            path = f"{commits_folder(layer)}/{name}"
            yield Problem(layer=layer, shard=None, reason=f"{path} is named as no commit record is", path=path)


def _check_unseen(store: Store) -> Iterator[Problem]:
    """Layers that have records but no spec: nobody can read them."""
    names = [name for name in store.storage.names("commits/losses") if layout.is_loss_name(name)]
    for layer in ("target", *(f"losses/{name}" for name in names)):
        if layer not in store.layers and (num := len(read_index(store.storage, layer))):
            reason = (
                f"{layer}/zarr.json is not there, so that nobody sees its {num} shards; restore it from a copy of the "
                "store, or run the dump again with the same model and options, which writes it anew"
            )
            yield Problem(layer=layer, shard=None, reason=reason)


def _group_problem(store: Store, path: str) -> str | None:
    try:
        found = read_attributes(store.storage, path.removesuffix("/zarr.json"))
    except FormatError:
        return f"{path} describes no Zarr group"
    return f"{path} is not there" if found is None else None


def _array_problem(store: Store, layer: str, array: layout.ArraySpec) -> str | None:
    """Compares an array's zarr.json with what it must be: other readers of Zarr go by it."""
    path = f"{layer}/{array.name}/zarr.json"
    try:
        found = parse_json(path, store.storage.get(path))
    except FileNotFoundError:
        return "is not there"
    except FormatError:
        return "is not JSON"
    k = entries_per_row(store.spec, layer)
    room = zarr_objects.num_shards_of(found, array, shard_rows=store.spec.shard_rows, k=k)
    if not room:
        return "describes another array"
    committed = store.layers[layer].index.upto(store.spec.num_shards).shards
    if len(committed) and room <= committed[-1]:
        return f"has room for {room} shards, not for shard {committed[-1]}"
    return None
