"""Opens a store and reads it: documents by number, or whole shards in order."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from logitstore.errors import IdentityError, LayerNotFoundError
from logitstore.format import layout
from logitstore.format.schemes import Scheme, check_smaller, describe, smaller
from logitstore.rows.shard_arrays import Part
from logitstore.rows.shard_checks import check_lengths
from logitstore.storage.storage import Storage
from logitstore.store.catalog import Catalog
from logitstore.store.commits.appends import check_end
from logitstore.store.documents import DocumentIndex, RowValues
from logitstore.store.shard_reader import ShardReader

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from logitstore.format.spec import StoreSpec, TargetSpec
    from logitstore.rows.shard import Document, Shard
    from logitstore.store.catalog import Layer

CACHE_BYTES = 50 * 10**9
CACHED_SHARDS = 4
"""Number of shards kept decoded for access by document number; about 60 MB each at 2**18 rows of 20 entries."""
SHARDS_AT_ONCE = 64
"""Number of shards whose document lengths are requested together: a bucket answers all in the time of a few."""
ROWS_AT_ONCE = 2**24
"""Limit on the rows of shards requested together, which bounds memory to 200 MB whatever the objects hold."""
INDEX_ARRAYS = frozenset({"lengths", "digests"})
"""The arrays of the tokens layer that `Store.documents` reads."""


class Store:
    """A store opened for reading, as it was when it was opened.

    Documents are numbered from 0 through the shards in order. Shards after the first one whose tokens are not
    committed are not visible.

    Attributes:
        catalog: The store's specs, layers and commit indexes.
        reader: Reads whole shards.
        storage: Where the store's objects are.
        spec: The specs as rows are read: `stored`, except for the scheme and the losses of a store opened as a smaller
            one.
        stored: The specs as stored.
        layers: The layers that can be read, by name: tokens, target, losses/<name>.
        num_shards: Number of visible shards.
        num_rows: Number of rows in them.
        num_counted: Number of rows in them whose loss mask is 1; only these have entries and losses.
    """

    def __init__(self, storage: Storage) -> None:
        """Reads the store's specs and lists its commit records.

        Raises:
            StoreNotFoundError: There is no store.
            FormatError: The store has another format version, or its metadata is malformed.
        """
        self._show(Catalog(storage), None)

    def _show(self, catalog: Catalog, scheme: Scheme | None) -> None:
        self.catalog = catalog
        self.reader = ShardReader(catalog, scheme)
        self.storage = catalog.storage
        self.stored = catalog.spec
        self.spec: StoreSpec = catalog.spec
        self.layers: dict[str, Layer] = catalog.layers
        self.num_shards = catalog.num_shards
        self.num_rows = catalog.num_rows
        self.num_counted = catalog.num_counted
        if scheme is not None and self.stored.target is not None:
            # Losses were computed on the stored entries, so that they do not fit rows of fewer entries.
            target = replace(self.stored.target, scheme=scheme)
            self.spec = replace(self.stored, target=target, losses={})
            self.layers = {name: layer for name, layer in catalog.layers.items() if not name.startswith("losses/")}
        self._cache: OrderedDict[tuple[int, tuple[str, ...]], Shard] = OrderedDict()
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        size = f"{self.num_documents:,} documents, {self.num_rows:,} rows, {', '.join(self.layers)}"
        caption = ""
        if self.spec.target != self.stored.target:
            caption = f" read as {_described(self.spec.target)} (stored: {_described(self.stored.target)})"
        return f"<Store {self.url}{caption}: {size}>"

    # A copy for another process shows the same contents and lists nothing again.

    def __getstate__(self) -> dict[str, Any]:
        return {"catalog": self.catalog, "scheme": self.reader.scheme}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._show(**state)

    @property
    def url(self) -> str:
        """The store's URL, without credentials."""
        return self.storage.url

    @property
    def num_documents(self) -> int:
        """Number of visible documents."""
        return int(self.catalog.first_document[-1])

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
        first = self.catalog.first_document
        shard = int(np.searchsorted(first, document, side="right")) - 1
        return shard, document - int(first[shard])

    def documents(self) -> DocumentIndex:
        """Reads the lengths and digests of all documents: two small objects of each shard.

        Raises:
            DamagedShardError: The stored bytes differ from what was committed.
            LayerNotFoundError: A shard was taken back since the store was opened.
            IdentityError: Another job than the store's made a shard.
        """
        lengths, digests = [np.empty(0, np.int64)], [np.empty(0, np.uint64)]
        size = max(1, min(SHARDS_AT_ONCE, ROWS_AT_ONCE // self.spec.shard_rows))
        for start in range(0, self.num_shards, size):
            numbers = range(start, min(start + size, self.num_shards))
            for arrays, commit in self.reader.read_parts([Part("tokens", shard, INDEX_ARRAYS) for shard in numbers]):
                check_lengths(self.spec, commit, arrays)
                lengths.append(arrays["lengths"].astype(np.int64))
                digests.append(arrays["digests"])
        return DocumentIndex(
            lengths=np.concatenate(lengths),
            digests=np.concatenate(digests),
            first_document=self.catalog.first_document,
        )

    def loss(self, name: str) -> RowValues:
        """Returns the soft cross entropy of a named model on the stored support, in nats, by document.

        Raises:
            LayerNotFoundError: The store has no losses of that name; the message lists those that it has.
            IdentityError: Rows are read by another scheme than the losses were computed with.
        """
        layer = self._loss_layer(name)
        return self._row_values(lambda shard: self.shard(shard, layers=("tokens", layer)).losses[name])

    def gap(self, draft: str, reference: str) -> RowValues:
        """Returns the loss gap of two named models, loss(draft) - loss(reference), in nats, by document.

        Raises the errors of `loss`.
        """
        layers = ("tokens", self._loss_layer(draft), self._loss_layer(reference))

        def read(shard: int) -> NDArray[np.float32]:
            losses = self.shard(shard, layers=layers).losses
            return losses[draft] - losses[reference]

        return self._row_values(read)

    def _row_values(self, read: Any) -> RowValues:  # noqa: ANN401
        return RowValues(
            self.num_documents, self.locate, lambda shard: self.shard(shard, layers=("tokens",)).starts, read
        )

    def _loss_layer(self, name: str) -> str:
        self.check_losses_readable()
        if name not in self.spec.losses:
            raise LayerNotFoundError(
                f"reference must be one of {sorted(self.spec.losses)} in {self.url}, got reference={name}; "
                f"add it with jobs/dump_logits.py --reference {name}=MODEL"
            )
        return layout.losses_layer(name)

    def check_losses_readable(self) -> None:
        """Raises IdentityError if rows are read by another scheme than the store's losses were computed with."""
        if self.spec.target != self.stored.target and self.stored.losses:
            raise IdentityError(
                f"losses must be of the rows that are read, got {', '.join(sorted(self.stored.losses))} of rows with "
                f"{_described(self.stored.target)} while they are read as {_described(self.spec.target)}; read the "
                "store as it is, or dump target and losses with the smaller scheme into a store of their own"
            )

    def shards(self, layers: Sequence[str] | None = None) -> Iterator[Shard]:
        """Reads every shard in order, which is the fastest way to read a store. `layers` as for `read_shard`."""
        for shard in range(self.num_shards):
            yield self.read_shard(shard, layers)

    def shard(self, shard: int, layers: Sequence[str] | None = None) -> Shard:
        """Reads one shard like `read_shard`, and keeps the last few in memory."""
        key = (shard, tuple(layers if layers is not None else self.layers))
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
            shard: Number of the shard.
            layers: Layers to read besides the tokens; all layers by default.

        Raises:
            LayerNotFoundError: The store has no such layer, or this shard of it is not committed.
            DamagedShardError: The stored bytes differ from what was committed.
            IdentityError: The layer was computed from other tokens or other target rows than the store holds now.
        """
        return self.reader.assemble(self.reader.read_layers(shard, self.layers if layers is None else layers))

    def read_as(self, scheme: Scheme) -> Store:
        """Returns this store as it would be read if it had been dumped with a smaller scheme. Reads nothing.

        The result has no losses, because those were computed on the stored entries. The scheme is always compared with
        the stored one: reading a smaller store by the stored scheme gives the whole store again, with its losses.

        Args:
            scheme: `topk` or `nucleus`, which at every row keeps no entry that is not stored.

        Raises:
            LayerNotFoundError: The store has no target layer.
            ValueError: `scheme` is no Scheme, or the stored rows may lack entries that it keeps.
        """
        if not isinstance(scheme, Scheme):
            raise ValueError(
                f"scheme must be a Scheme, got scheme={scheme!r}; make one with logitstore.format.schemes.make_scheme"
            )
        stored = self._target().scheme
        if self.spec.target is not None and scheme == self.spec.target.scheme:
            return self
        if scheme != stored:
            check_smaller(stored, scheme)
        other = Store.__new__(Store)
        other._show(self.catalog, None if scheme == stored else scheme)
        return other

    def read_smaller(self, *, k: int | None, mass: float | None) -> Store:
        """Returns this store read with fewer entries at a row, or the store itself if neither option is given.

        Args:
            k: Greatest number of entries of a row; None for the stored one.
            mass: Probability mass of a nucleus, as which a `topk` store can be read too; None for the stored one.

        Raises:
            LayerNotFoundError: The store has no target layer.
            ValueError: A value is out of range, or the stored rows may lack entries that are asked for.
        """
        return self if k is None and mass is None else self.read_as(smaller(self._target().scheme, k=k, mass=mass))

    def _target(self) -> TargetSpec:
        if self.stored.target is None:
            raise LayerNotFoundError(f"store must have a target layer, got store={self.url}; dump the target first")
        return self.stored.target


def _described(target: TargetSpec | None) -> str:
    return "no target" if target is None else describe(target.scheme)


def open(
    url: str | os.PathLike[str],
    storage_options: dict[str, Any] | None = None,
    *,
    scheme: Scheme | None = None,
    cache_dir: str | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> Store:
    """Opens a store for reading.

    Args:
        url: A folder or any fsspec URL.
        storage_options: Options of the URL's file system, such as credentials. Never stored.
        scheme: Truncates rows while they are read, as if they had been dumped with this scheme (`Store.read_as`).
        cache_dir: Local folder that keeps objects read from a bucket. Any number of processes may share it.
        cache_bytes: Size limit of that folder; the least recently used objects are deleted first.

    Raises:
        StoreNotFoundError: There is no store.
        FormatError: The store has another format version, or its metadata is malformed or covers fewer shards than
            are committed.
        MissingDriverError: No installed package opens such a URL.
        ValueError: The URL is blank or that of a file, or the stored rows may lack entries that `scheme` keeps.
    """
    store = Store(Storage(url, storage_options, None if cache_dir is None else (cache_dir, cache_bytes)))
    check_end(store.storage, store.spec, store.layers["tokens"].index)
    return store if scheme is None else store.read_as(scheme)
