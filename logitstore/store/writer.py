"""Creates stores and layers, and writes a layer shard by shard.

A shard exists for readers as soon as its commit record exists.
"""

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
from logitstore.store.commits import appends, protocol, set_aside
from logitstore.store.commits.index import find_commit, read_index

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from logitstore.format.commit import Commit
    from logitstore.storage.storage import Storage

S = TypeVar("S", bound="StoreSpec | TargetSpec | LossSpec")

MAX_RECORD_BYTES = 2**20
"""Maximum size of a commit record that is written, in bytes; readers accept records four times as large. A record of
this size can name about 4,000 documents that were set aside, with the reasons. If more documents of one shard fail,
there is probably a common cause, so the writer refuses the shard."""

FOLDERS = ("tokens", "target", "losses", "commits", protocol.STAGING, appends.FOLDER, set_aside.FOLDER)
"""Names of the folders in the root of a store."""
OTHER_STORE = "give that value, or another --store"
"""Next step that error messages suggest if a store was made from other data, another model or other options."""


def check_free(storage: Storage) -> None:
    """Checks that a store can be created: the root has no files, or only those of a store that has lost its zarr.json.

    Raises:
        ValueError: The root holds other files.
    """
    foreign = [name for name in storage.names("") if name not in FOLDERS and not name.startswith(".")]
    if foreign:
        raise ValueError(
            f"store must be a new or empty folder, or a store, got store={storage.url}, which holds other files, such "
            f"as {foreign[0]}; give another --store"
        )


def create_store(storage: Storage, spec: StoreSpec) -> None:
    """Creates an empty store with room for the spec's shards, or checks that the existing store has the same spec.

    Args:
        storage: The store's root.
        spec: The store's spec. Its fields `target`, `losses` and `appends` are ignored.

    Raises:
        IdentityError: The store exists, and was made from another tokenizer, other documents or other options.
        FormatError: The store's metadata is malformed, or describes other arrays.
    """
    own = replace(spec, target=None, losses={}, appends=())
    # A store that has lost its zarr.json must not get a new one that contradicts the committed shards.
    if read_attributes(storage, "") is None:
        _check_shards(storage, "tokens", own, OTHER_STORE)
    created = storage.create("zarr.json", zarr_objects.group_metadata({"logitstore": to_json(own)}))
    if not created:
        stored = stored_spec(StoreSpec, read_attributes(storage, "") or {}, "store")
        check_same(stored, own, "store", OTHER_STORE)
        # check_same ignores these two fields, because a store may grow. Here they must agree too, because the given
        # spec describes the documents with which the store begins.
        for name, old, new in (
            ("documents", stored.data.documents, spec.data.documents),
            ("num_shards", stored.num_shards, spec.num_shards),
        ):
            if old != new:
                raise IdentityError(f"{name} must be {old} as in the store, got {name}={new}; {OTHER_STORE}")
    storage.create("tokens/zarr.json", zarr_objects.group_metadata({}))
    make_room(storage, spec, "tokens")


def add_layer(storage: Storage, spec: StoreSpec, layer: str, layer_spec: TargetSpec | LossSpec) -> None:
    """Adds an empty layer with room for the store's shards, or checks that the existing layer has the same spec.

    An existing layer with another spec is replaced if it has no committed shard.

    Args:
        storage: The store's root.
        spec: The store's spec, as read from the store.
        layer: `target` or `losses/<name>`.
        layer_spec: Spec of the layer: its model and, for `target`, its scheme.

    Raises:
        IdentityError: The layer has committed shards that were made with another model or scheme, or another job
            creates the layer with another spec at the same time.
        ValueError: A shard would have too many entries, or `layer` is not a valid name.
    """
    layout.layer_arrays(layer)  # Raises ValueError for an invalid name, before the name becomes part of a path.
    if isinstance(layer_spec, TargetSpec):
        check_room(spec.shard_rows, layer_spec.room)
    is_ours = check_layer(storage, layer, layer_spec)
    # All losses layers share the group `losses`, which needs its own metadata.
    if "/" in layer:
        storage.create(f"{layer.partition('/')[0]}/zarr.json", zarr_objects.group_metadata({}))
    path, metadata = f"{layer}/zarr.json", zarr_objects.group_metadata({"logitstore": to_json(layer_spec)})
    if is_ours:
        storage.create(path, metadata)
    else:
        # The values of the old spec are not deleted: readers ignore values without a commit, and another writer of the
        # new spec may have committed some values by now. The metadata of the arrays is deleted, because the new scheme
        # may need other shapes; make_room writes the metadata again.
        storage.put(path, metadata)
        for array in layout.layer_arrays(layer):
            storage.remove(f"{layer}/{array.name}/zarr.json")
    # Another job may have written the spec of this layer since the check above, so the spec is checked again.
    if read_attributes(storage, layer) is None or not check_layer(storage, layer, layer_spec):
        raise IdentityError(
            f"layer {layer!r} must be created by one job at a time, but another job has just created it with another "
            "model; stop one of the two jobs"
        )
    make_room(storage, _with(spec, layer_spec), layer)


def check_layer(storage: Storage, layer: str, layer_spec: TargetSpec | LossSpec) -> bool:
    """Compares a layer of the store with the spec that a writer would give it. Writes nothing.

    Args:
        storage: The store's root.
        layer: `target` or `losses/<name>`.
        layer_spec: The spec that the writer would give the layer.

    Returns:
        True if the layer has this spec or does not exist. False if it has another spec but no committed shard, so
        that a writer may replace it.

    Raises:
        IdentityError: The layer has committed shards that were made with another model or scheme.
    """
    next_step = OTHER_STORE if layer == "target" else "give another NAME in --reference NAME=MODEL"
    if (found := read_attributes(storage, layer)) is None:
        _check_shards(storage, layer, layer_spec, next_step)
        return True
    try:
        check_same(stored_spec(type(layer_spec), found, layer), layer_spec, layer, next_step)
    except IdentityError:
        # Without a committed shard, no reader depends on the old spec.
        if len(read_index(storage, layer)):
            raise
        return False
    return True


def _check_shards(storage: Storage, layer: str, own: StoreSpec | TargetSpec | LossSpec, next_step: str) -> None:
    """Raises IdentityError if the committed shards of a layer without zarr.json were made with a spec other than `own`.

    Only the first committed shard is compared.
    """
    index = read_index(storage, layer)
    commit = find_commit(storage, layer, int(index.shards[0])) if len(index) else None
    if commit is not None and commit.made_by != maker(own):
        raise IdentityError(
            f"{layer} has {len(index)} committed shards, but the zarr.json with their spec is missing, and they were "
            f"made with another model or other options; give the same options as before, or {next_step}"
        )


def make_room(storage: Storage, spec: StoreSpec, layer: str) -> None:
    """Writes the metadata of a layer's arrays, or enlarges their shapes to cover appended shards.

    Only other Zarr readers use this metadata. This package derives the layout of an array from the specs.

    Args:
        storage: The store's root.
        spec: The store's spec, with the appended shards and the layer's spec.
        layer: `tokens`, `target` or `losses/<name>`.

    Raises:
        FormatError: The metadata of an array is not JSON, or describes a different array.
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
                f"{path} must describe {array.name} of this store, got a different array; run `logitstore verify "
                "--repair`, which writes it anew"
            )
        # A larger shape is kept, because another job may have enlarged it for its appended shards.
        if num_shards < spec.num_shards:
            storage.put(path, wanted)


def _with(spec: StoreSpec, layer_spec: TargetSpec | LossSpec) -> StoreSpec:
    """Returns `spec`, with `layer_spec` as its target if `layer_spec` is a TargetSpec.

    The spec of the target determines how many entries a row has room for.
    """
    return replace(spec, target=layer_spec) if isinstance(layer_spec, TargetSpec) else spec


def _is_readable(commit: Commit) -> bool:
    """Returns whether a commit record can be parsed and has at most MAX_RECORD_BYTES.

    For example, many documents in `set_aside` make a record too long.
    """
    data = commit_bytes(commit)
    try:
        parse_commit(data, commit.layer, commit.shard, commit.name)
    except DamagedShardError:
        return False
    return len(data) <= MAX_RECORD_BYTES


class LayerWriter:
    """Writes shards of one layer.

    Any number of writers, in any number of processes, may write at the same time, even to the same shard.
    """

    def __init__(self, storage: Storage, spec: StoreSpec, layer: str) -> None:
        """Opens an existing layer for writing.

        Args:
            storage: The store's root.
            spec: The spec of the store, including the specs of its layers, such as `Store.spec`.
            layer: `tokens`, `target` or `losses/<name>`.

        Raises:
            LayerNotFoundError: The store has no such layer.
        """
        own: StoreSpec | TargetSpec | LossSpec | None = spec
        if layer != "tokens":
            own = spec.target if layer == "target" else spec.losses.get(layer.removeprefix("losses/"))
        if own is None:
            raise LayerNotFoundError(
                f"store must have layer {layer!r} before its shards are written, got {storage.url} without that layer; "
                "add the layer first"
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
        """Writes all arrays of a shard, then its commit record. A shard that is already committed is not changed.

        Args:
            shard: The shard's number.
            values: The layer's arrays, by name, without padding.
            documents: Number of documents in the shard.
            rows: Number of rows in the shard.
            counted: Number of rows with loss mask 1, excluding rows of documents that are set aside.
            computed_from: Digest of the same shard in the layer below. The values were computed from that shard. None
                for tokens.
            started: time.monotonic() at the start of the computation. The commit record holds the seconds since then.
            set_aside: Documents that could not be computed, as a mapping from a document's index in the shard to the
                reason.
            fidelity: Fidelity sums by name (`logitstore.format.fidelity_sums`), as `logitstore.dump.scoring.measuring`
                computes them.

        Returns:
            The commit record that the shard has now. If another writer committed the shard first, this is the record of
            that writer, and its digest may differ from the digest of `values`.

        Raises:
            IdentityError: The layer now has another spec, or the committed shard was made by another model.
            ValueError: Too many documents are set aside to fit in a commit record, or the names or values in `fidelity`
                are not valid for the layer.
            FormatError: An encoded array does not decode to the same values.
            DamagedShardError: The shard has several records, or a record that does not match its file name.
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
            raise ValueError(f"fidelity must be finite sums, got fidelity={fidelity} of shard {shard}; report this bug")
        if not _is_readable(commit):
            raise ValueError(
                f"set_aside must fit in a commit record, got {len(commit.set_aside)} of {documents} documents in shard "
                f"{shard}; find out why these fail; the first one: {next(iter(commit.set_aside.values()), '')}"
            )
        # Computing the values can take long, and another job may have replaced the spec meanwhile.
        self._check_still_ours()
        # If another writer was faster, `kept` is the record of that writer, which may use another model.
        kept = protocol.publish(self._storage, commit, encoded)
        if kept.made_by != self._made_by:
            raise IdentityError(
                f"another job wrote shard {shard} of layer {self._layer!r} with another model ({kept.made_by[:19]} "
                f"instead of {self._made_by[:19]}); stop one of the two jobs"
            )
        return kept

    def _encode(self, values: NDArray[Any], array: layout.ArraySpec) -> bytes | None:
        """Encodes an array, and checks that decoding gives the same values.

        Returns None if all values are the fill value.

        Encoding errors must be found now, because the target model may not be available later to compute the values
        again.
        """
        data = zarr_objects.encode(values, array, **self._sizes)
        decoded = zarr_objects.decode(data, len(values), array, **self._sizes)
        if crc32c(decoded) != crc32c(values.astype(array.dtype, copy=False)):
            raise FormatError(
                f"{self._layer}/{array.name} must decode to the encoded values, got other values; check the versions "
                "of zarr and numcodecs, and this machine's memory"
            )
        return data

    def _check_still_ours(self) -> None:
        """Raises IdentityError if another job has replaced the layer's spec since this writer was opened."""
        found = read_attributes(self._storage, "" if self._layer == "tokens" else self._layer)
        stored = None if found is None else stored_spec(type(self._own), found, self._layer)
        if stored is None or maker(stored) != self._made_by:
            raise IdentityError(
                f"another job replaced layer {self._layer!r} in {self._storage.url} while this job was writing it, and "
                "uses another model; stop one of the two jobs"
            )
