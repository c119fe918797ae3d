"""Opens a store and reads it: documents by number, or whole shards in order."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from logitstore.errors import IdentityError, LayerNotFoundError, nearest
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
"""Default size limit of the local cache folder, in bytes."""
CACHED_SHARDS = 4
"""Number of decoded shards kept in memory for access by document number. A shard with 2**18 rows of 20 entries takes
about 60 MB."""
SHARDS_AT_ONCE = 64
"""Maximum number of shards whose document lengths are requested together. A bucket answers 64 such requests in about
the time that it takes for a few."""
ROWS_AT_ONCE = 2**24
"""Maximum total capacity, in rows, of the shards whose document lengths are requested together. This limits the memory
for the lengths and digests to 200 MB, even if a store was made to exhaust memory."""
INDEX_ARRAYS = frozenset({"lengths", "digests"})
"""The arrays of the tokens layer that `Store.documents` reads."""


class Store:
    """A store opened for reading, with the contents that it had when it was opened.

    Documents are numbered from 0 in the order of the shards. If the tokens of a shard are not committed, this shard and
    all later shards are not visible.

    Attributes:
        catalog: The store's specs, layers and commit indexes.
        reader: Reads whole shards.
        storage: Storage that holds the store's objects.
        spec: The specs of the store as it is read. If the store is read with a smaller scheme (`read_as`), the specs
            have that scheme and no losses. Otherwise they are equal to `stored`.
        stored: The specs of the store as stored.
        layers: The layers that can be read, by name: tokens, target, losses/<name>.
        num_shards: Number of visible shards.
        num_rows: Number of rows in the visible shards.
        num_counted: Number of rows with loss mask 1 in the visible shards; only these rows have entries and losses.
    """

    def __init__(self, storage: Storage) -> None:
        """Reads the store's specs and lists its commit records.

        Raises:
            StoreNotFoundError: No store exists at the URL of `storage`.
            FormatError: The store has another format version, or its metadata is malformed.
        """
        self._show(Catalog(storage), None)

    def _show(self, catalog: Catalog, scheme: Scheme | None) -> None:
        """Sets all attributes of a new store, of an unpickled copy, or of a store that is read with another scheme."""
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
            # Losses were computed on the stored entries, so they do not belong to rows with fewer entries.
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

    # A copy that is unpickled in another process shows the same contents without listing the store again.

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
        """Returns the shard of a document, and the document's place in that shard. Negative numbers count from the end.

        Raises:
            IndexError: No document has this number.
        """
        n = self.num_documents
        if not -n <= document < n:
            raise IndexError(f"document must be between {-n} and {n - 1}, got document={document}")
        document %= n
        first = self.catalog.first_document
        shard = int(np.searchsorted(first, document, side="right")) - 1
        return shard, document - int(first[shard])

    def documents(self) -> DocumentIndex:
        """Reads the lengths and digests of all visible documents.

        Reads the commit record and two small objects of each shard.

        Raises:
            DamagedShardError: The stored bytes differ from what was committed.
            LayerNotFoundError: A shard was taken back since the store was opened.
            IdentityError: A shard was made with a spec that differs from the store's spec.
        """
        # The empty arrays let np.concatenate succeed for a store without visible shards.
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
        """Returns the losses of a named model, by document, in nats.

        The loss is the soft cross entropy between the target's distribution (the stored entries and the tail mass)
        and the distribution of the named model.

        Raises:
            LayerNotFoundError: The store has no losses of that name; the error message lists the existing names.
            IdentityError: The store is read with a smaller scheme than the scheme that the losses were computed with.
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
        # A shard is read when one of its values is requested. `shard` keeps the most recently used shards in memory.
        return RowValues(
            self.num_documents, self.locate, lambda shard: self.shard(shard, layers=("tokens",)).starts, read
        )

    def _loss_layer(self, name: str) -> str:
        self.check_losses_readable()
        if not self.spec.losses:
            raise LayerNotFoundError(
                f"{self.url} has no losses yet, so reference={name} cannot be read; add them with "
                f"`logitstore dump --store {self.url} --reference {name}=MODEL`"
            )
        if name not in self.spec.losses:
            raise LayerNotFoundError(
                f"reference must be one of {sorted(self.spec.losses)} in {self.url}, got reference={name}"
                f"{nearest(name, self.spec.losses)}; add it with `logitstore dump --store {self.url} --reference "
                f"{name}=MODEL`"
            )
        return layout.losses_layer(name)

    def check_losses_readable(self) -> None:
        """Raises IdentityError if the store has losses but is read with a smaller scheme than theirs."""
        if self.spec.target != self.stored.target and self.stored.losses:
            raise IdentityError(
                f"losses must be computed on the rows that are read, got {', '.join(sorted(self.stored.losses))} on "
                f"rows with {_described(self.stored.target)}, but the store is read as {_described(self.spec.target)}; "
                "read the store as it is, or dump target and losses with the smaller scheme into another store"
            )

    def shards(self, layers: Sequence[str] | None = None) -> Iterator[Shard]:
        """Yields every visible shard in order. This is the fastest way to read a whole store.

        Args:
            layers: Layers to read besides the tokens; all layers by default.
        """
        for shard in range(self.num_shards):
            yield self.read_shard(shard, layers)

    def shard(self, shard: int, layers: Sequence[str] | None = None) -> Shard:
        """Reads one shard like `read_shard`, and keeps the CACHED_SHARDS most recently used shards in memory."""
        key = (shard, tuple(layers if layers is not None else self.layers))
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        # The lock is not held while a shard is read, so that several threads can read at the same time.
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
            LayerNotFoundError: The store has no such layer, or the shard is not committed in it.
            DamagedShardError: The stored bytes differ from what was committed.
            IdentityError: Another model made the shard, or the shard was computed from tokens or target rows that the
                store no longer holds.
        """
        return self.reader.assemble(self.reader.read_layers(shard, self.layers if layers is None else layers))

    def read_as(self, scheme: Scheme) -> Store:
        """Returns this store as if it had been dumped with a smaller scheme. Reads nothing.

        If `scheme` is the stored scheme, the returned store has all entries and the losses. Otherwise the returned
        store has no losses, because the losses were computed on all stored entries.

        `scheme` always applies to the stored rows, even if this store is itself the result of `read_as`.

        Args:
            scheme: A `topk` or `nucleus` scheme. Every row must store all entries that this scheme keeps.

        Raises:
            LayerNotFoundError: The store has no target layer.
            ValueError: `scheme` is not a Scheme, or the stored rows may lack entries that `scheme` keeps.
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
        # `__init__` would list the store again and could find other contents.
        other = Store.__new__(Store)
        other._show(self.catalog, None if scheme == stored else scheme)
        return other

    def read_smaller(self, *, k: int | None, mass: float | None) -> Store:
        """Returns a view of this store whose rows have fewer entries, or the store itself if both options are None.

        Args:
            k: Maximum number of entries of a row; None keeps the stored limit.
            mass: Probability mass of a nucleus, above 0 and at most 1; None keeps the stored mass. If `mass` is given
                for a `topk` store, the rows are read with a `nucleus` scheme.

        Raises:
            LayerNotFoundError: The store has no target layer.
            ValueError: A value is out of range, or the stored rows may lack entries that the smaller scheme keeps.
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
        storage_options: Options of the URL's file system, such as credentials. They are never stored.
        scheme: Smaller scheme to which rows are truncated while they are read, as if the store had been dumped with
            this scheme (`Store.read_as`). None reads all entries.
        cache_dir: Local folder that keeps objects read from a bucket. Any number of processes may share it.
        cache_bytes: Size limit of `cache_dir` in bytes; the least recently used objects are deleted first.

    Raises:
        StoreNotFoundError: No store exists at the URL.
        FormatError: The store has another format version, or its metadata is malformed or covers fewer shards than
            are committed.
        LayerNotFoundError: `scheme` is given, but the store has no target layer.
        MissingDriverError: No installed package can open this kind of URL.
        ValueError: The URL is blank or names a file, or the stored rows may lack entries that `scheme` keeps.
    """
    store = Store(Storage(url, storage_options, None if cache_dir is None else (cache_dir, cache_bytes)))
    check_end(store.storage, store.spec, store.layers["tokens"].index)
    return store if scheme is None else store.read_as(scheme)
