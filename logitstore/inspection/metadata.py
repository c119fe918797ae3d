"""Checks what a store holds outside its shards: metadata of groups and arrays, names of commit records, and appends."""

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
    """A damaged or stale shard of a layer, or another problem of the layer."""

    layer: str
    """Layer that has the problem."""
    shard: int | None
    """Number of the damaged or stale shard; None for a problem outside shards."""
    reason: str
    """Description of the problem, in one line."""
    path: str | None = None
    """Path of the damaged object, if it is outside shards. `repair` removes this object, and writes it again if it is
    metadata. None if the problem is inside a shard, or if `repair` cannot solve it."""

    def __str__(self) -> str:
        return f"{self.layer}{'' if self.shard is None else f'/{self.shard}'}: {self.reason}"


def check_metadata(store: Store) -> Iterator[Problem]:
    """Yields the problems in a store's metadata, in its lists of commit records and in its appends."""
    for layer in store.layers:
        yield from _check_names(store, layer)
        if not len(store.layers[layer].index):
            continue  # An empty layer is not checked, because another job may be creating it right now.
        if (path := plain_group(layer)) is not None and (reason := _group_problem(store, path)) is not None:
            yield Problem(layer=layer, shard=None, reason=reason, path=path)
        for array in layout.layer_arrays(layer):
            if (reason := _array_problem(store, layer, array)) is not None:
                path = f"{layer}/{array.name}/zarr.json"
                yield Problem(layer=layer, shard=None, reason=f"{path} {reason}", path=path)
    yield from _check_unseen(store)
    for name in stray_appends(store.storage, store.spec.appends):
        reason = (
            f"{FOLDER}/{name} exists, but the append before it is missing, so readers do not see its documents; "
            "restore the missing file from a copy of the store, or run the dump with the --data of the missing append "
            "and --append"
        )
        yield Problem(layer="tokens", shard=None, reason=reason)


def write_anew(store: Store, layer: str) -> None:
    """Writes the missing metadata of a layer again. The spec of the layer must exist."""
    if (path := plain_group(layer)) is not None:
        store.storage.create(path, zarr_objects.group_metadata({}))
    make_room(store.storage, store.spec, layer)


def plain_group(layer: str) -> str | None:
    """Returns the path of a layer's zarr.json file, if that file only marks a folder as a Zarr group.

    If such a file is lost, it can be created again.

    Returns:
        For `tokens`, the zarr.json of the layer. For a losses layer, the zarr.json of the group of all losses layers.
        None for `target`: its zarr.json holds the spec of the layer, and a lost spec cannot be recovered.
    """
    return {"tokens": "tokens/zarr.json", "target": None}.get(layer, "losses/zarr.json")


def _check_names(store: Store, layer: str) -> Iterator[Problem]:
    """Yields a problem for each .json file in the commits folder whose name is not that of a commit record."""
    for name in store.layers[layer].index.unknown:
        if name.endswith(".json"):
            path = f"{commits_folder(layer)}/{name}"
            yield Problem(
                layer=layer, shard=None, reason=f"{path} does not have the name of a commit record", path=path
            )


def _check_unseen(store: Store) -> Iterator[Problem]:
    """Yields a problem for each layer that has commit records but no spec. Such a layer cannot be read."""
    names = [name for name in store.storage.names("commits/losses") if layout.is_loss_name(name)]
    for layer in ("target", *(f"losses/{name}" for name in names)):
        if layer not in store.layers and (num := len(read_index(store.storage, layer))):
            reason = (
                f"{layer}/zarr.json is missing, so readers do not see its {num} shards; restore it from a copy of the "
                "store, or run the dump again with the same model and options, which writes it anew"
            )
            yield Problem(layer=layer, shard=None, reason=reason)


def _group_problem(store: Store, path: str) -> str | None:
    """Returns a text about the problem with the zarr.json of a group; None if the file describes a Zarr group."""
    try:
        found = read_attributes(store.storage, path.removesuffix("/zarr.json"))
    except FormatError:
        return f"{path} does not describe a Zarr group"
    return f"{path} is missing" if found is None else None


def _array_problem(store: Store, layer: str, array: layout.ArraySpec) -> str | None:
    """Returns a text about the problem with the zarr.json of an array; None if the file is correct.

    This package does not read these files, but other readers of Zarr do.
    """
    path = f"{layer}/{array.name}/zarr.json"
    try:
        found = parse_json(path, store.storage.get(path))
    except FileNotFoundError:
        return "is missing"
    except FormatError:
        return "is not JSON"
    k = entries_per_row(store.spec, layer)
    room = zarr_objects.num_shards_of(found, array, shard_rows=store.spec.shard_rows, k=k)
    if not room:
        return "describes another array"
    # An array of the right kind may still be too short, if it was not enlarged after an append.
    committed = store.layers[layer].index.upto(store.spec.num_shards).shards
    if len(committed) and room <= committed[-1]:
        return f"has room for {room} shards, not for shard {committed[-1]}"
    return None
