"""Reads a store: documents by number, shards in order. Every value that comes out was checked against its commit."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from logitstore import codec, commits, layout
from logitstore.errors import DamagedShardError, FormatError, IdentityError, LayerNotFoundError, StoreNotFoundError
from logitstore.spec import LossSpec, StoreSpec, TargetSpec
from logitstore.storage import Storage
from logitstore.writer import stored_spec

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from logitstore.commits import Commit
    from logitstore.rows import Rows

CACHED_SHARDS = 4
"""Shards that stay decoded for access by document number; about 60 MB each at 2**18 rows of 20 entries."""


@dataclass(frozen=True, kw_only=True)
class Document:
    """One document of T tokens."""

    ids: NDArray[np.uint32]
    """[T]"""
    loss_mask: NDArray[np.bool_]
    """[T]: whether the prediction made at this row, of the next token, counts. Never at the last."""
    rows: Rows | None
    """The target's T rows; None in a store that has no target layer."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """The documents of one shard, end to end, R rows in all."""

    index: int
    ids: NDArray[np.uint32]
    """[R]"""
    loss_mask: NDArray[np.bool_]
    """[R]"""
    lengths: NDArray[np.int64]
    """[D]: tokens of each document."""
    tokens_digest: str
    """Identity of ids, mask and lengths."""
    rows: Rows | None
    """The target's rows, None where they were not asked for."""
    target_digest: str | None
    """Identity of the rows."""
    losses: dict[str, NDArray[np.float32]]
    """[R] each: soft cross entropy by model name, NaN where masked."""

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """[D + 1]: document i has rows starts[i]..starts[i + 1]."""
        starts = np.zeros(len(self.lengths) + 1, dtype=np.int64)
        np.cumsum(self.lengths, out=starts[1:])
        return starts

    def __len__(self) -> int:
        return len(self.lengths)

    def document(self, i: int) -> Document:
        """Returns document i of this shard; views, no copies."""
        start, stop = int(self.starts[i]), int(self.starts[i + 1])
        return Document(
            ids=self.ids[start:stop],
            loss_mask=self.loss_mask[start:stop],
            rows=None if self.rows is None else self.rows.slice(start, stop),
        )


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What one stage added."""

    name: str
    spec: StoreSpec | TargetSpec | LossSpec
    committed: frozenset[int]
    """Shards that are there."""
    num_shards: int
    """Shards that there will be."""

    @property
    def missing(self) -> list[int]:
        """Shards not committed yet, in order."""
        return [shard for shard in range(self.num_shards) if shard not in self.committed]


class RowValues:
    """One float per row, by document: `values[17]` is float32 [T], NaN where the loss mask is 0."""

    def __init__(self, store: Store, read: Callable[[int], NDArray[np.float32]]) -> None:
        self._store = store
        self._read = read

    def __len__(self) -> int:
        return self._store.num_documents

    def __getitem__(self, document: int) -> NDArray[np.float32]:
        shard, place = self._store.locate(document)
        starts = self._store.shard(shard, layers=("tokens",)).starts
        return self._read(shard)[starts[place] : starts[place + 1]]


class Store:
    """A store opened for reading, as it was when it was opened.

    Documents are numbered from 0 through the shards in order. Only shards up to the first one whose tokens are not
    committed are seen.

    Attributes:
        spec: What the store holds, from what, and how.
        layers: What each stage added, by name: tokens, target, losses/<name>.
        num_shards: Shards seen.
        num_rows: Rows in them.
        num_counted: Rows in them whose loss mask is 1; only these have entries and losses.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        attributes = storage.group_attributes("")
        if attributes is None:
            raise StoreNotFoundError(
                f"url must be that of a store, got url={storage.url} without a "
                "zarr.json; give --data and --target to the dump to make one there"
            )
        spec = stored_spec(StoreSpec, attributes, "store")
        target = storage.group_attributes("target")
        names = [name for name in storage.names("losses") if name != "zarr.json"]
        losses = {name: storage.group_attributes(layout.losses_layer(name)) for name in names}
        self.spec = StoreSpec(
            **{name: getattr(spec, name) for name in spec.__dataclass_fields__ if name not in ("target", "losses")},
            target=None if target is None else stored_spec(TargetSpec, target, "target"),
            losses={
                name: stored_spec(LossSpec, found, f"losses/{name}")
                for name, found in losses.items()
                if found is not None
            },
        )
        specs: dict[str, StoreSpec | TargetSpec | LossSpec] = {"tokens": self.spec}
        if self.spec.target is not None:
            specs["target"] = self.spec.target
        specs |= {layout.losses_layer(name): loss for name, loss in self.spec.losses.items()}
        self.layers = {
            name: Layer(
                name=name,
                spec=layer_spec,
                committed=frozenset(commits.committed_shards(storage, name)),
                num_shards=spec.num_shards,
            )
            for name, layer_spec in specs.items()
        }
        missing = self.layers["tokens"].missing
        self.num_shards = missing[0] if missing else spec.num_shards
        found_commits = commits.read_commits(storage, "tokens", list(range(self.num_shards)))
        self._commits: dict[tuple[str, int], Commit] = {("tokens", c.shard): c for c in found_commits}
        self._first_document = np.cumsum([0, *(c.documents for c in found_commits)])
        self.num_rows = sum(c.rows for c in found_commits)
        self.num_counted = sum(c.counted for c in found_commits)
        self._arrays: dict[tuple[str, str], Any] = {}
        self._cache: OrderedDict[tuple[int, tuple[str, ...]], Shard] = OrderedDict()
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<Store {self.url}: {self.num_documents:,} documents, {self.num_rows:,} rows, {', '.join(self.layers)}>"

    def __reduce__(self) -> tuple[type[Store], tuple[Storage]]:
        return Store, (self._storage,)

    @property
    def url(self) -> str:
        """Where the store is, without credentials."""
        return self._storage.url

    @property
    def num_documents(self) -> int:
        """How many documents there are."""
        return int(self._first_document[-1])

    def __len__(self) -> int:
        return self.num_documents

    def __getitem__(self, document: int) -> Document:
        shard, place = self.locate(document)
        return self.shard(shard, layers=tuple(name for name in ("tokens", "target") if name in self.layers)).document(
            place
        )

    def locate(self, document: int) -> tuple[int, int]:
        """Returns the shard of a document and its place there; negative numbers count from the end.

        Raises:
            IndexError: There is no such document.
        """
        n = self.num_documents
        if not -n <= document < n:
            raise IndexError(f"document must be between {-n} and {n - 1}, got document={document}")
        document %= n
        shard = int(np.searchsorted(self._first_document, document, side="right")) - 1
        return shard, document - int(self._first_document[shard])

    def loss(self, name: str) -> RowValues:
        """Returns the soft cross entropy of a named model on the stored support, nats, by document.

        Raises:
            LayerNotFoundError: The store has no losses of that name; the message lists those that it has.
        """
        layer = self._loss_layer(name)
        return RowValues(self, lambda shard: self.shard(shard, layers=("tokens", layer)).losses[name])

    def gap(self, draft: str, reference: str) -> RowValues:
        """Returns the loss gap of two named models, loss(draft) - loss(reference), nats, by document."""
        layers = ("tokens", self._loss_layer(draft), self._loss_layer(reference))

        def read(shard: int) -> NDArray[np.float32]:
            losses = self.shard(shard, layers=layers).losses
            return losses[draft] - losses[reference]

        return RowValues(self, read)

    def _loss_layer(self, name: str) -> str:
        if name not in self.spec.losses:
            raise LayerNotFoundError(
                f"reference must be one of {sorted(self.spec.losses)} in {self.url}, got reference={name}; "
                f"add it with jobs/dump_logits.py --reference {name}=MODEL"
            )
        return layout.losses_layer(name)

    def shards(self, layers: Sequence[str] | None = None) -> Iterator[Shard]:
        """Reads every shard in order: the fast path. `layers` as for `shard`."""
        for shard in range(self.num_shards):
            yield self.read_shard(shard, layers)

    def shard(self, shard: int, layers: Sequence[str] | None = None) -> Shard:
        """Like `read_shard`, and keeps the last few in memory."""
        key = (shard, tuple(layers or self.layers))
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        value = self.read_shard(shard, layers)
        with self._lock:
            self._cache[key] = value
            while len(self._cache) > CACHED_SHARDS:
                self._cache.popitem(last=False)
        return value

    def read_shard(self, shard: int, layers: Sequence[str] | None = None) -> Shard:
        """Reads one shard and checks it.

        Args:
            shard: Which.
            layers: What to read besides the tokens; all layers by default.

        Raises:
            LayerNotFoundError: A layer is not there, or the shard of it is not committed.
            DamagedShardError: What is stored is not what was committed.
            IdentityError: The layer was computed from other tokens or other target rows than the store holds now.
        """
        wanted = tuple(layers or self.layers)
        tokens = self.read_arrays("tokens", shard)
        mask = tokens["loss_mask"].astype(bool)
        lengths = tokens["lengths"].astype(np.int64)
        if int(lengths.sum()) != len(mask):
            raise DamagedShardError("tokens", shard, f"documents of {lengths.sum()} rows in all, not {len(mask)}")
        rows = target_digest = None
        if "target" in wanted:
            rows, target_digest = self._read_rows(shard), self.commit("target", shard).digest
        return Shard(
            index=shard,
            ids=tokens["ids"],
            loss_mask=mask,
            lengths=lengths,
            tokens_digest=self.commit("tokens", shard).digest,
            rows=rows,
            target_digest=target_digest,
            losses={
                layer.removeprefix("losses/"): self.read_arrays(layer, shard)["ce"]
                for layer in wanted
                if layer.startswith("losses/")
            },
        )

    def _read_rows(self, shard: int) -> Rows:
        if self.spec.target is None:
            raise LayerNotFoundError(f"layer must be one of {list(self.layers)}, got layer=target; dump it first")
        arrays = self.read_arrays("target", shard)
        if int(arrays["counts"].sum(dtype=np.int64)) != len(arrays["token_ids"]):
            raise DamagedShardError("target", shard, "counts that do not add up to its entries")
        if arrays["token_ids"].max(initial=0) >= self.spec.tokenizer.vocab_size:
            raise DamagedShardError("target", shard, "token ids beyond the vocabulary")
        return codec.decode(arrays, self.spec.target.codebook)

    def commit(self, layer: str, shard: int) -> Commit:
        """Returns the commit record of a shard.

        Raises:
            LayerNotFoundError: The layer is not there, or the shard of it is not committed.
        """
        if layer not in self.layers:
            raise LayerNotFoundError(f"layer must be one of {list(self.layers)} in {self.url}, got layer={layer}")
        if shard not in self.layers[layer].committed:
            raise LayerNotFoundError(
                f"shard must be committed, got shard={shard} of layer {layer!r} in {self.url}, where "
                f"{len(self.layers[layer].committed)} of {self.spec.num_shards} are; run the dump again to finish it"
            )
        if (layer, shard) not in self._commits:
            self._commits[layer, shard] = commits.read_commits(self._storage, layer, [shard])[0]
        return self._commits[layer, shard]

    def read_arrays(self, layer: str, shard: int) -> dict[str, NDArray[Any]]:
        """Reads the arrays of a shard as they are stored, without padding, and checks them against its commit."""
        commit = self.commit(layer, shard)
        self._check_identity(commit)
        k = self.spec.target.scheme.k if layer == "target" and self.spec.target else 1
        values = {}
        for array in layout.layer_arrays(layer):
            start = layout.shard_span(array, shard, self.spec.shard_rows, k).start
            num = commits.length(commit, array.per)
            if num > layout.capacity(array, self.spec.shard_rows, k):
                raise DamagedShardError(layer, shard, f"a commit record of {num} values per {array.per}")
            values[array.name] = self._read(layer, shard, array.name, slice(start, start + num))
            if values[array.name].dtype != np.dtype(array.dtype):
                raise DamagedShardError(layer, shard, f"{array.name} of type {values[array.name].dtype}")
            if (found := commits.checksum(values[array.name])) != commit.checksums[array.name]:
                raise DamagedShardError(
                    layer, shard, f"{array.name} with checksum {found}, not {commit.checksums[array.name]}"
                )
        return values

    def _check_identity(self, commit: Commit) -> None:
        below = {"tokens": None, "target": "tokens"}.get(commit.layer, "target")
        way_out = "dump into another store" if below == "tokens" else "dump the losses again under another name"
        if below is not None and commit.computed_from != (now := self.commit(below, commit.shard).digest):
            raise IdentityError(
                f"shard {commit.shard} of layer {commit.layer!r} must be computed from {below} {now[:19]}, got "
                f"{str(commit.computed_from)[:19]}; these values are stale: {way_out}"
            )

    def _read(self, layer: str, shard: int, name: str, span: slice) -> NDArray[Any]:
        array = self._open_array(layer, name)
        try:
            return np.asarray(array[span])
        except (ValueError, RuntimeError) as error:  # what zarr's checksum and Blosc codecs raise on damaged bytes
            raise DamagedShardError(layer, shard, f"{name} that cannot be decoded ({error})") from error


    def _open_array(self, layer: str, name: str) -> Any:  # noqa: ANN401
        if (layer, name) not in self._arrays:
            try:
                self._arrays[layer, name] = self._storage.zarr_group(layer)[name]
            except (KeyError, ValueError, TypeError) as error:  # what zarr raises on metadata missing or malformed
                raise FormatError(
                    f"{layer}/{name}/zarr.json must describe a Zarr array, got {type(error).__name__}: {error}; "
                    "restore it from a copy of the store"
                ) from error
        return self._arrays[layer, name]


def open(url: str | os.PathLike[str], storage_options: dict[str, Any] | None = None) -> Store:
    """Opens a store for reading.

    Args:
        url: A folder or any fsspec URL.
        storage_options: What the URL's file system needs, such as credentials. Never stored.

    Raises:
        StoreNotFoundError: There is no store.
        FormatError: It is of another format version, or its metadata is malformed.
        MissingDriverError: No installed package opens such a URL.
    """
    return Store(Storage(url, storage_options))
