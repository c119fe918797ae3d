"""Writes one layer of a store, shard by shard. A shard is there for readers once its commit record is."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from logitstore.errors import DamagedShardError, FormatError, IdentityError, LayerNotFoundError
from logitstore.format import layout, zarr_objects
from logitstore.format.commit import commit_bytes, crc32c, make_commit, parse_commit
from logitstore.format.fidelity_sums import is_measured
from logitstore.format.spec import LossSpec, StoreSpec, TargetSpec, check_room, check_same, maker, to_json
from logitstore.format.strict_json import parse_json
from logitstore.rows.shard_arrays import entries_per_row
from logitstore.store.catalog import read_attributes, stored_spec
from logitstore.store.commits import protocol
from logitstore.store.commits.index import find_commit, read_index

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from logitstore.format.commit import Commit
    from logitstore.storage.storage import Storage

S = TypeVar("S", bound="StoreSpec | TargetSpec | LossSpec")

MAX_RECORD_BYTES = 2**20
"""A quarter of what readers take: some 4,000 documents set aside, of which most will have one cause."""

OTHER_STORE = "give another --store, or delete this one"


def create_store(storage: Storage, spec: StoreSpec) -> None:
    """Creates an empty store with room for the spec's shards, or goes on with one made from the same spec.

    Raises:
        IdentityError: There is a store made from another tokenizer, other documents or other options.
    """
    own = replace(spec, target=None, losses={}, appends=())
    if read_attributes(storage, "") is None:
        _check_shards(storage, "tokens", own, OTHER_STORE)
    created = storage.create("zarr.json", zarr_objects.group_metadata({"logitstore": to_json(own)}))
    if not created:
        stored = stored_spec(StoreSpec, read_attributes(storage, "") or {}, "store")
        check_same(stored, own, "store", OTHER_STORE)
        # Informational where specs are compared (a store may grow), but who creates one has its first documents.
        for name, old, new in (
            ("documents", stored.data.documents, spec.data.documents),
            ("num_shards", stored.num_shards, spec.num_shards),
        ):
            if old != new:
                raise IdentityError(f"{name} must be {old} as in the store, got {name}={new}; {OTHER_STORE}")
    storage.create("tokens/zarr.json", zarr_objects.group_metadata({}))
    make_room(storage, spec, "tokens")


def add_layer(storage: Storage, spec: StoreSpec, layer: str, layer_spec: TargetSpec | LossSpec) -> None:
    """Adds an empty layer with room for the store's shards, or goes on with one made from the same spec.

    Args:
        storage: The store's root.
        spec: The store's spec, as read from it.
        layer: `target` or `losses/<name>`.
        layer_spec: What the layer will hold.

    Raises:
        IdentityError: The layer is there and was made by another model or scheme.
        ValueError: A shard would have too many entries, or there cannot be a layer of that name.
    """
    layout.layer_arrays(layer)
    if isinstance(layer_spec, TargetSpec):
        check_room(spec.shard_rows, layer_spec.room)
    is_ours = check_layer(storage, layer, layer_spec)
    if "/" in layer:
        storage.create(f"{layer.partition('/')[0]}/zarr.json", zarr_objects.group_metadata({}))
    path, metadata = f"{layer}/zarr.json", zarr_objects.group_metadata({"logitstore": to_json(layer_spec)})
    if is_ours:
        storage.create(path, metadata)
    else:
        # Whoever still writes for the other model is refused by his next commit, and his commits by readers. Values
        # stay: without a commit they mean nothing, and they may have one by now, of another writer of this very model.
        storage.put(path, metadata)
        for array in layout.layer_arrays(layer):
            storage.remove(f"{layer}/{array.name}/zarr.json")
    if read_attributes(storage, layer) is None or not check_layer(storage, layer, layer_spec):
        raise IdentityError(
            f"{layer} must be begun by one job at a time, got another that began it with another model just now; stop "
            "one of them"
        )
    make_room(storage, _with(spec, layer_spec), layer)


def check_layer(storage: Storage, layer: str, layer_spec: TargetSpec | LossSpec) -> bool:
    """Compares a layer of the store with what is to be written into it. Writes nothing.

    Returns:
        False if the layer is there from another model or scheme but holds no shard, and may be begun anew.

    Raises:
        IdentityError: It is there from another model or scheme, and holds shards.
    """
    next_step = OTHER_STORE if layer == "target" else "give another NAME in --reference NAME=MODEL"
    if (found := read_attributes(storage, layer)) is None:
        _check_shards(storage, layer, layer_spec, next_step)
        return True
    try:
        check_same(stored_spec(type(layer_spec), found, layer), layer_spec, layer, next_step)
    except IdentityError:
        if len(read_index(storage, layer)):
            raise
        return False
    return True


def _check_shards(storage: Storage, layer: str, own: StoreSpec | TargetSpec | LossSpec, next_step: str) -> None:
    """Refuses to give another spec to shards that lost theirs."""
    index = read_index(storage, layer)
    commit = find_commit(storage, layer, int(index.shards[0])) if len(index) else None
    if commit is not None and commit.made_by != maker(own):
        raise IdentityError(
            f"{layer} must be made as its {len(index)} shards were, whose zarr.json is gone, got another model or "
            f"other options; give the same as before, or {next_step}"
        )


def make_room(storage: Storage, spec: StoreSpec, layer: str) -> None:
    """Writes the metadata of a layer's arrays, or makes their shapes cover shards that were appended.

    For other readers of Zarr only: this package knows from the specs what an array must be.

    Raises:
        FormatError: An array is there and is another.
    """
    k = entries_per_row(spec, layer)
    for array in layout.layer_arrays(layer):
        path = f"{layer}/{array.name}/zarr.json"
        sizes = {"shard_rows": spec.shard_rows, "k": k}
        wanted = zarr_objects.array_metadata(array, num_shards=spec.num_shards, **sizes)
        if storage.create(path, wanted):
            continue
        found = parse_json(path, storage.get(path))
        if zarr_objects.same_metadata(found, wanted):
            continue
        if not (num_shards := zarr_objects.num_shards_of(found, array, **sizes)):
            raise FormatError(
                f"{path} must describe {array.name} of this store, got another array; "
                "`logitstore verify --repair` writes it anew"
            )
        if num_shards < spec.num_shards:
            storage.put(path, wanted)


def _with(spec: StoreSpec, layer_spec: TargetSpec | LossSpec) -> StoreSpec:
    return replace(spec, target=layer_spec) if isinstance(layer_spec, TargetSpec) else spec


def _is_readable(commit: Commit) -> bool:
    """Returns whether readers will take a record: the reasons in it may be long, or have too many brackets."""
    data = commit_bytes(commit)
    try:
        parse_commit(data, commit.layer, commit.shard, commit.name)
    except DamagedShardError:
        return False
    return len(data) <= MAX_RECORD_BYTES


class LayerWriter:
    """Writes shards of one layer. Any number, in any processes, may write at once, the same shards too."""

    def __init__(self, storage: Storage, spec: StoreSpec, layer: str) -> None:
        """Opens a layer that was created.

        Args:
            storage: The store's root.
            spec: The store's spec with those of its layers, as a reader has it.
            layer: Which layer.
        """
        own: StoreSpec | TargetSpec | LossSpec | None = spec
        if layer != "tokens":
            own = spec.target if layer == "target" else spec.losses.get(layer.removeprefix("losses/"))
        if own is None:
            raise LayerNotFoundError(
                f"store must have layer {layer!r} to write to, got {storage.url} without; add it first"
            )
        self._storage = storage
        self._layer = layer
        self._own = own
        self._made_by = maker(own)
        self._sizes = {"shard_rows": spec.shard_rows, "k": entries_per_row(spec, layer)}

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
        set_aside: Mapping[int, str] | None = None,
        fidelity: Mapping[str, float] | None = None,
    ) -> Commit:
        """Writes all arrays of a shard, then its commit record; a shard that is committed stays as it is.

        Args:
            shard: Which shard.
            values: The layer's arrays, by name, without padding.
            documents: Documents in the shard.
            rows: Rows in the shard.
            counted: How many of them have loss mask 1.
            computed_from: Digest of the shard that these values were computed from.
            started: time.monotonic() when computing began, for the record.
            set_aside: Why documents could not be computed, by their place in the shard.
            fidelity: How true the values are, as `logitstore.dump.scoring.measuring` measures it.

        Returns:
            The record that is committed now. Its digest is another's if another writer was first with other values.

        Raises:
            IdentityError: The layer, or what is committed, is another model's.
            ValueError: Too many documents are set aside to name them all, or `fidelity` has other names than the
                layer's, or numbers that are not finite.
        """
        arrays = {array.name: np.asarray(values[array.name]) for array in layout.layer_arrays(self._layer)}
        encoded = {array.name: self._encode(arrays[array.name], array) for array in layout.layer_arrays(self._layer)}
        commit = make_commit(
            self._layer,
            shard,
            arrays,
            documents=documents,
            rows=rows,
            counted=counted,
            computed_from=computed_from,
            made_by=self._made_by,
            seconds=time.monotonic() - started,
            set_aside=set_aside,
            fidelity=fidelity,
        )
        if not is_measured(self._layer, commit.fidelity, counted):
            raise ValueError(f"fidelity must be finite sums, got fidelity={fidelity} of shard {shard}; report this")
        if not _is_readable(commit):
            raise ValueError(
                f"set_aside must be of few documents, got {len(commit.set_aside)} of {documents} in shard {shard}; "
                f"find out why they fail: {next(iter(commit.set_aside.values()), '')}"
            )
        self._check_still_ours()
        kept = protocol.publish(self._storage, commit, encoded)
        if kept.made_by != self._made_by:
            raise IdentityError(
                f"shard {shard} of layer {self._layer!r} must be made by {self._made_by[:19]}, "
                f"got {kept.made_by[:19]}: another job writes this layer with another model; stop one of them"
            )
        return kept

    def _encode(self, values: NDArray[Any], array: layout.ArraySpec) -> bytes | None:
        """Encodes and reads back: what cannot be read is found now, not when the target is gone."""
        data = zarr_objects.encode(values, array, **self._sizes)
        decoded = zarr_objects.decode(data, len(values), array, **self._sizes)
        if crc32c(decoded) != crc32c(values.astype(array.dtype, copy=False)):
            raise FormatError(
                f"{self._layer}/{array.name} must decode to what was encoded, got other values; check the versions of "
                "zarr and numcodecs, and this machine's memory"
            )
        return data

    def _check_still_ours(self) -> None:
        found = read_attributes(self._storage, "" if self._layer == "tokens" else self._layer)
        stored = None if found is None else stored_spec(type(self._own), found, self._layer)
        if stored is None or maker(stored) != self._made_by:
            raise IdentityError(
                f"layer {self._layer!r} must be as it was when writing began, got another in {self._storage.url}: "
                "another job began it anew with another model; stop one of them"
            )
