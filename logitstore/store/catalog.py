"""The contents of a store at the moment it was opened: its specs, its layers, and its committed shards.

This module reads no arrays; `shard_reader` does that.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from logitstore.errors import DamagedShardError, FormatError, IdentityError, LayerNotFoundError, StoreNotFoundError
from logitstore.format import layout
from logitstore.format.commit import parse_commit, short_digest
from logitstore.format.spec import LossSpec, StoreSpec, TargetSpec, check_room, from_json, maker
from logitstore.format.strict_json import FROM_A_COPY
from logitstore.rows.shard_arrays import MAX_COMMIT_BYTES, check_commit_fits
from logitstore.store.commits.appends import joined, read_appends
from logitstore.store.commits.index import commits_folder, read_index

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from numpy.typing import NDArray

    from logitstore.format.commit import Commit
    from logitstore.storage.storage import Storage
    from logitstore.store.commits.index import Index

WAY_OUT = f"{FROM_A_COPY}, or delete it and run the dump again with the same options, which writes it anew"
"""Next step that error messages suggest if the zarr.json of a group is malformed."""

S = TypeVar("S", bound="StoreSpec | TargetSpec | LossSpec")


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer of an opened store: `tokens`, `target` or `losses/<name>`."""

    name: str
    """Name of the layer."""
    spec: StoreSpec | TargetSpec | LossSpec
    """Spec of the layer."""
    made_by: str
    """Digest of the spec, from `maker`. Every commit record of the layer must have the same digest."""
    index: Index
    """The committed shards."""
    num_shards: int
    """Number of shards that the layer has when it is finished."""
    stale: frozenset[int]
    """Numbers of committed shards whose values were computed from values that the layer below no longer holds. Readers
    refuse these shards, and the next dump replaces them."""

    @property
    def committed(self) -> frozenset[int]:
        """Numbers of the committed shards, including stale ones."""
        return self.index.committed

    @property
    def gaps(self) -> list[range]:
        """Ranges of consecutive shards that are not committed yet, in order."""
        # Only committed shards are examined, so that a long run of missing shards costs no time.
        edges = np.concatenate([[-1], self.index.upto(self.num_shards).shards, [self.num_shards]])
        (before,) = np.nonzero(np.diff(edges) > 1)
        return [range(a + 1, b) for a, b in zip(edges[before].tolist(), edges[before + 1].tolist(), strict=True)]

    @property
    def num_missing(self) -> int:
        """Number of shards that are not committed yet."""
        return sum(map(len, self.gaps))

    @cached_property
    def missing(self) -> list[int]:
        """Numbers of the shards that are not committed yet, in order."""
        return list(itertools.chain.from_iterable(self.gaps))


class Catalog:
    """The specs, layers and commit indexes of a store at the moment it was opened.

    Attributes:
        storage: Storage that holds the store's objects.
        spec: The specs of the store and of all its layers, as stored.
        layers: The layers by name, in the order tokens, target, losses.
        num_shards: Number of visible shards: those before the first shard whose tokens are not committed.
        first_document: Int64 [num_shards + 1]; shard s holds the documents with numbers from first_document[s] to
            first_document[s + 1] - 1.
        num_rows: Number of rows in the visible shards.
        num_counted: Number of rows with loss mask 1 in the visible shards.
    """

    def __init__(self, storage: Storage) -> None:
        """Reads the specs and lists the commit records.

        Raises:
            StoreNotFoundError: No store exists at the URL of `storage`.
            FormatError: The store has another format version, or its metadata is malformed.
        """
        self.storage = storage
        attributes = read_attributes(storage, "")
        if attributes is None:
            raise StoreNotFoundError(
                f"url must lead to a store, got url={storage.url}, which has no zarr.json; check the "
                "path, or create a store there by a dump with --data and --target"
            )
        spec = stored_spec(StoreSpec, attributes, "store")
        # Other jobs may add layers at the same time, so losses are read before the target. A losses layer is added
        # after its target, so the target of every losses layer found here exists when the target is read.
        losses = {}
        for name in storage.names("losses"):
            if layout.is_loss_name(name) and (found := read_attributes(storage, f"losses/{name}")) is not None:
                losses[name] = stored_spec(LossSpec, found, f"losses/{name}")
        target = read_attributes(storage, "target")
        self.spec = replace(
            joined(spec, read_appends(storage, spec)),
            target=None if target is None else stored_spec(TargetSpec, target, "target"),
            losses=losses,
        )
        # A store from an untrusted source may have a scheme whose shards would exceed the memory of a reader.
        if self.spec.target is not None:
            try:
                check_room(self.spec.shard_rows, self.spec.target.room)
            except ValueError as error:
                raise FormatError(f"target is malformed: {error}") from error
        self.layers = _list_layers(storage, self.spec)
        tokens = self.layers["tokens"].index.upto(self.spec.num_shards)
        # Documents are numbered in the order of the shards. The numbers of documents after a missing shard are unknown,
        # so later shards are not visible.
        gaps = np.flatnonzero(tokens.shards != np.arange(len(tokens)))
        self.num_shards = int(gaps[0]) if len(gaps) else len(tokens)
        self.first_document: NDArray[np.int64] = np.zeros(self.num_shards + 1, dtype=np.int64)
        np.cumsum(tokens.documents[: self.num_shards], out=self.first_document[1:])
        self.num_rows = int(tokens.rows[: self.num_shards].sum())
        self.num_counted = int(tokens.counted[: self.num_shards].sum())

    def record_path(self, layer: str, shard: int) -> str:
        """Returns the path of a shard's commit record.

        Raises:
            LayerNotFoundError: The store has no such layer, or the shard is not committed in it.
            DamagedShardError: The shard has several records.
        """
        url = self.storage.url
        if layer not in self.layers:
            raise LayerNotFoundError(
                f"layer must be one of {list(self.layers)} in {url}, got layer={layer}; dump it first"
            )
        index = self.layers[layer].index
        if (place := index.find(shard)) is None:
            if shard not in range(n := self.spec.num_shards):
                raise LayerNotFoundError(
                    f"shard must be at least 0 and below {n}, got shard={shard}; {url} has {n} shards"
                )
            raise LayerNotFoundError(
                f"shard must be committed, got shard={shard} of layer {layer!r}, which is not ({url} has {len(index)} "
                f"of {self.spec.num_shards} shards of this layer); run the dump again to finish the layer"
            )
        if shard in index.contested:
            raise DamagedShardError(layer, shard, "several commit records")
        return f"{commits_folder(layer)}/{index.name(place)}"

    def check(self, layer: str, shard: int, data: bytes | None) -> Commit:
        """Parses a commit record, and checks it against the store's specs and against the layer below.

        Args:
            layer: The shard's layer.
            shard: The shard's number.
            data: The bytes read at `record_path`; None if no object was found there.

        Raises:
            LayerNotFoundError: No record was found, or the shard is not committed in the layer below.
            DamagedShardError: The record is malformed, or does not match its file name.
            IdentityError: Another model made the shard, or the shard was computed from values that the layer below no
                longer holds.
        """
        if data is None:
            raise LayerNotFoundError(
                f"shard must be committed, got shard={shard} of layer {layer!r} in {self.storage.url}, which was taken "
                "back since the store was opened; open the store again"
            )
        if len(data) > MAX_COMMIT_BYTES:
            raise DamagedShardError(layer, shard, "a commit record that is too long")
        commit = parse_commit(data, layer, shard, self.record_path(layer, shard).rpartition("/")[2])
        check_commit_fits(self.spec, commit)
        way_out = {
            "tokens": "dump into another store",
            "target": "take the shard back with `logitstore verify --repair` and dump it again",
        }.get(layer, "dump the losses again, which replaces the stale ones")
        if commit.made_by != (now := self.layers[layer].made_by):
            raise IdentityError(
                f"shard {shard} of layer {layer!r} must be made with the layer's spec ({now[:19]}), got a shard that "
                f"another job made with another spec ({commit.made_by[:19]}); {way_out}"
            )
        below = layout.below(layer)
        if below is None:
            if commit.computed_from is not None:
                raise DamagedShardError(layer, shard, "a commit record of tokens that names a layer below")
            return commit
        index = self.layers[below].index if below in self.layers else None
        if index is None or (place := index.find(shard)) is None:
            raise LayerNotFoundError(
                f"layer {below!r} in {self.storage.url} must have shard {shard}, because layer {layer!r} has a shard "
                "that was computed from it; run the dump again to write the missing shard"
            )
        if shard in index.contested:
            raise DamagedShardError(below, shard, "several commit records")
        # The index holds only the short digests of the layer below, so these are compared. No further record is read.
        digest = index.digests[place]
        if short_digest(commit.computed_from).encode() != digest:
            raise IdentityError(
                f"shard {shard} of layer {layer!r} must be computed from the present {below} ({digest.decode()}), got "
                f"stale values, computed from earlier ones ({short_digest(commit.computed_from)}); {way_out}"
            )
        return commit


def _list_layers(storage: Storage, spec: StoreSpec) -> dict[str, Layer]:
    specs: dict[str, StoreSpec | TargetSpec | LossSpec] = {"tokens": spec}
    if spec.target is not None:
        specs["target"] = spec.target
    specs |= {layout.losses_layer(name): loss for name, loss in spec.losses.items()}
    # Each layer is listed before the layer below it. A shard is committed in the layer below first, so the later
    # listing of the layer below includes every shard of the earlier listing.
    indexes = {name: read_index(storage, name) for name in reversed(specs)}
    return {
        name: Layer(
            name=name,
            spec=layer_spec,
            made_by=maker(layer_spec),
            index=indexes[name],
            num_shards=spec.num_shards,
            stale=stale_shards(indexes[name], indexes[below])
            if (below := layout.below(name)) in indexes
            else frozenset(),
        )
        for name, layer_spec in specs.items()
    }


def stale_shards(index: Index, below: Index) -> frozenset[int]:
    """Returns the numbers of the stale shards: those computed from values that the layer below no longer holds.

    Shards that have several records in either layer are left out, because they are damaged, not stale.

    Args:
        index: Index of the layer.
        below: Index of the layer below.
    """
    common, places, places_below = np.intersect1d(index.shards, below.shards, assume_unique=True, return_indices=True)
    others = frozenset(common[index.origins[places] != below.digests[places_below]].tolist())
    return others - index.contested - below.contested


def read_attributes(storage: Storage, path: str) -> dict[str, Any] | None:
    """Reads the attributes of a group; None if the group has no zarr.json.

    Args:
        storage: The store's root.
        path: Path of the group, relative to the root; "" is the root group itself.

    Raises:
        FormatError: The zarr.json is not JSON, or does not describe a group of Zarr version 3.
    """
    name = f"{path}/zarr.json" if path else "zarr.json"
    try:
        metadata = storage.get_json(name, WAY_OUT)
    except FileNotFoundError:
        return None
    if not isinstance(metadata, dict) or metadata.get("node_type") != "group" or metadata.get("zarr_format") != 3:
        raise FormatError(f"{name} must describe a Zarr group, got {metadata!r:.80}; this is not a logitstore store")
    attributes = metadata.get("attributes", {})
    if not isinstance(attributes, dict):
        raise FormatError(
            f"attributes must be a JSON object, got attributes={attributes!r:.80}; this is not a logitstore store"
        )
    return attributes


def stored_spec(cls: type[S], attributes: Mapping[str, Any], where: str) -> S:
    """Parses a spec from a group's attributes; `where` names the spec in error messages."""
    return from_json(cls, attributes.get("logitstore"), where)


def runs(shards: Collection[int]) -> list[range]:
    """Groups shard numbers into runs of consecutive numbers, in order."""
    numbers = sorted(shards)
    starts = [i for i, shard in enumerate(numbers) if i == 0 or shard != numbers[i - 1] + 1]
    return [range(numbers[start], numbers[stop - 1] + 1) for start, stop in itertools.pairwise([*starts, len(numbers)])]


def spans(shards: list[range], most: int = 10) -> str:
    """Formats runs of shards as text, such as "1, 4-6, 9 and 20 more".

    Args:
        shards: Runs of shard numbers.
        most: Maximum number of runs to show. If there are more runs, the text ends with the number of shards in
            the other runs.
    """
    texts = [str(run.start) if len(run) == 1 else f"{run.start}-{run.stop - 1}" for run in shards[:most]]
    more = f" and {sum(map(len, shards[most:])):,} more" if len(shards) > most else ""
    return ", ".join(texts) + more
