"""Writes one layer of a store, shard by shard. A shard is there for readers once its commit record is."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from logitstore import commits, layout
from logitstore.errors import FormatError, IdentityError
from logitstore.spec import LossSpec, StoreSpec, TargetSpec, check_same, from_json, to_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from logitstore.commits import Commit
    from logitstore.storage import Storage

S = TypeVar("S", bound="StoreSpec | TargetSpec | LossSpec")

OTHER_STORE = "give another --store, or delete this one"


def create_store(storage: Storage, spec: StoreSpec) -> None:
    """Creates an empty store with room for the spec's shards, or goes on with one made from the same spec.

    Raises:
        IdentityError: There is a store made from another tokenizer, other documents or other options.
    """
    if (found := storage.group_attributes("")) is not None:
        stored = stored_spec(StoreSpec, found, "store")
        check_same(stored, replace(spec, target=None, losses={}), "store", OTHER_STORE)
        # The number of shards is informational elsewhere (a store may grow), but a resumed one has these documents.
        if stored.num_shards != spec.num_shards:
            raise FormatError(
                f"num_shards must be {stored.num_shards} as in the store, got num_shards={spec.num_shards} from other "
                f"documents; {OTHER_STORE}"
            )
    else:
        storage.create_group("", {"logitstore": to_json(spec)})
    _create_layer(storage, spec, "tokens", k=1, attributes={})


def add_layer(storage: Storage, spec: StoreSpec, layer: str, layer_spec: TargetSpec | LossSpec) -> None:
    """Adds an empty layer with room for the store's shards, or goes on with one made from the same spec.

    Args:
        storage: The store's root.
        spec: The store's spec, as read from it.
        layer: `target` or `losses/<name>`.
        layer_spec: What the layer will hold.

    Raises:
        IdentityError: The layer is there and was made by another model or scheme.
    """
    if not check_layer(storage, layer, layer_spec):
        storage.remove(layer)
    k = layer_spec.scheme.k if isinstance(layer_spec, TargetSpec) else 1
    _create_layer(storage, spec, layer, k=k, attributes={"logitstore": to_json(layer_spec)})


def check_layer(storage: Storage, layer: str, layer_spec: TargetSpec | LossSpec) -> bool:
    """Compares a layer of the store with what is to be written into it. Writes nothing.

    Returns:
        False if the layer is there from another model or scheme but holds no shard, and may be begun anew.

    Raises:
        IdentityError: It is there from another model or scheme, and holds shards.
    """
    if (found := storage.group_attributes(layer)) is None:
        return True
    next_step = OTHER_STORE if layer == "target" else "give another NAME in --reference NAME=MODEL"
    try:
        check_same(stored_spec(type(layer_spec), found, layer), layer_spec, layer, next_step)
    except IdentityError:
        if commits.committed_shards(storage, layer):
            raise
        return False
    return True


def stored_spec(cls: type[S], attributes: Mapping[str, Any], where: str) -> S:
    """Reads a spec from a group's attributes."""
    return from_json(cls, attributes.get("logitstore"), where)


def _create_layer(storage: Storage, spec: StoreSpec, layer: str, *, k: int, attributes: dict[str, Any]) -> None:
    if storage.group_attributes(layer) is None:
        storage.create_group(layer, attributes)
    group = storage.zarr_group(layer, mode="r+")
    layout.create_arrays(group, layer, num_shards=spec.num_shards, shard_rows=spec.shard_rows, k=k)


class LayerWriter:
    """Writes shards of one layer. Several, in any processes, may write different shards at once."""

    def __init__(self, storage: Storage, spec: StoreSpec, layer: str) -> None:
        self._storage = storage
        self._shard_rows = spec.shard_rows
        self._k = spec.target.scheme.k if layer == "target" and spec.target else 1
        self._layer = layer
        group = storage.zarr_group(layer, mode="r+")
        self._arrays = {array.name: group[array.name] for array in layout.layer_arrays(layer)}

    def write(
        self,
        shard: int,
        values: Mapping[str, NDArray[Any]],
        *,
        documents: int,
        rows: int,
        counted: int,
        computed_from: str | None,
        started: float,
    ) -> Commit:
        """Writes all arrays of a shard, then its commit record.

        Args:
            shard: Which shard.
            values: The layer's arrays, by name, without padding.
            documents: Documents in the shard.
            rows: Rows in the shard.
            counted: How many of them have loss mask 1.
            computed_from: Digest of the shard that these values were computed from.
            started: time.monotonic() when computing began, for the record.

        Returns:
            The record as written.
        """
        for array in layout.layer_arrays(self._layer):
            span = layout.shard_span(array, shard, self._shard_rows, self._k)
            whole = layout.padded(values[array.name], array, span.stop - span.start)
            self._arrays[array.name][span] = whole  # type: ignore[index]
        commit = commits.describe(
            self._layer,
            shard,
            {name: np.asarray(value) for name, value in values.items()},
            documents=documents,
            rows=rows,
            counted=counted,
            computed_from=computed_from,
            seconds=time.monotonic() - started,
        )
        commits.write_commit(self._storage, commit)
        return commit
