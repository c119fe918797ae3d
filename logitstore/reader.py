"""Reads a store: documents by number, shards in order. Every value that comes out was checked against its commit."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from logitstore import commits, document_index, layers, layout, records, shards, views
from logitstore.appends import check_end, joined, read_appends
from logitstore.attributes import read_attributes, stored_spec
from logitstore.errors import DamagedShardError, FormatError, IdentityError, LayerNotFoundError, StoreNotFoundError
from logitstore.row_values import RowValues
from logitstore.shards import Document, Part, Shard
from logitstore.spec import LossSpec, StoreSpec, TargetSpec, check_room, maker
from logitstore.storage import Storage

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from logitstore.commits import Commit
    from logitstore.document_index import DocumentIndex
    from logitstore.schemes import Scheme

CACHE_BYTES = 50 * 10**9
CACHED_COMMITS = 10_000
"""Records that stay in memory; about 2 kB each."""
CACHED_SHARDS = 4
"""Shards that stay decoded for access by document number; about 60 MB each at 2**18 rows of 20 entries."""


class Stored(NamedTuple):
    """A shard of a layer as it is stored."""

    arrays: dict[str, NDArray[Any]]
    commit: Commit


class Store:
    """A store opened for reading, as it was when it was opened.

    Documents are numbered from 0 through the shards in order. Only shards up to the first one whose tokens are not
    committed are seen.

    Attributes:
        storage: Where its bytes lie.
        spec: What is read, from what, and how.
        stored: What is stored: has another scheme, and losses, where rows are truncated as they are read.
        layers: What each stage added, by name: tokens, target, losses/<name>.
        num_shards: Shards seen.
        num_rows: Rows in them.
        num_counted: Rows in them whose loss mask is 1; only these have entries and losses.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        attributes = read_attributes(storage, "")
        if attributes is None:
            raise StoreNotFoundError(
                f"url must be that of a store, got url={storage.url} without a "
                "zarr.json; give --data and --target to the dump to make one there"
            )
        spec = stored_spec(StoreSpec, attributes, "store")
        # From what is written last to what is written first: all that a listing speaks of is in the next ones.
        losses = {}
        for name in storage.names("losses"):
            if layout.is_loss_name(name) and (found := read_attributes(storage, f"losses/{name}")) is not None:
                losses[name] = stored_spec(LossSpec, found, f"losses/{name}")
        target = read_attributes(storage, "target")
        self.spec = self.stored = replace(
            joined(spec, read_appends(storage, spec)),
            target=None if target is None else stored_spec(TargetSpec, target, "target"),
            losses=losses,
        )
        if self.spec.target is not None:
            try:
                check_room(self.spec.shard_rows, self.spec.target.room)
            except ValueError as error:
                raise FormatError(f"target is malformed: {error}") from error
        specs: dict[str, StoreSpec | TargetSpec | LossSpec] = {"tokens": self.spec}
        if self.spec.target is not None:
            specs["target"] = self.spec.target
        specs |= {layout.losses_layer(name): loss for name, loss in self.spec.losses.items()}
        indexes = {name: commits.read_index(storage, name) for name in reversed(specs)}
        self.layers = {
            name: layers.Layer(
                name=name,
                spec=layer_spec,
                made_by=maker(layer_spec),
                index=indexes[name],
                num_shards=self.spec.num_shards,
                stale=layers.stale(indexes[name], indexes[below])
                if (below := layout.below(name)) in indexes
                else frozenset(),
            )
            for name, layer_spec in specs.items()
        }
        tokens = indexes["tokens"].upto(self.spec.num_shards)
        gaps = np.flatnonzero(tokens.shards != np.arange(len(tokens)))
        self.num_shards = int(gaps[0]) if len(gaps) else len(tokens)
        self._first_document = np.concatenate([[0], np.cumsum(tokens.documents[: self.num_shards])])
        self.num_rows = int(tokens.rows[: self.num_shards].sum())
        self.num_counted = int(tokens.counted[: self.num_shards].sum())
        self._commits: OrderedDict[tuple[str, int], Commit] = OrderedDict()
        self._cache: OrderedDict[tuple[int, tuple[str, ...]], Shard] = OrderedDict()
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        size = f"{self.num_documents:,} documents, {self.num_rows:,} rows, {', '.join(self.layers)}"
        return f"<Store {self.url}{views.caption(self)}: {size}>"

    # A copy for another process sees what this one saw, and lists nothing again.

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_commits": OrderedDict(), "_cache": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())

    @property
    def url(self) -> str:
        """Where the store is, without credentials."""
        return self.storage.url

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

    def documents(self) -> DocumentIndex:
        """Reads the lengths and digests of all documents, and nothing else of them; errors as of `read_shard`."""
        return document_index.read(self)

    def loss(self, name: str) -> RowValues:
        """Returns the soft cross entropy of a named model on the stored support, nats, by document.

        Raises:
            LayerNotFoundError: The store has no losses of that name; the message lists those that it has.
            IdentityError: Rows are read by another scheme than its losses were computed with.
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
        views.check_losses(self)
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
            shard: Which.
            layers: What to read besides the tokens; all layers by default.

        Raises:
            LayerNotFoundError: A layer is not there, or the shard of it is not committed.
            DamagedShardError: What is stored is not what was committed.
            IdentityError: The layer was computed from other tokens or other target rows than the store holds now.
        """
        return self.assemble(self.read_stored(shard, layers))

    def assemble(self, values: dict[str, Stored]) -> Shard:
        """Makes a shard of what `read_stored` read, and checks that the values can be what they are said to be.

        Raises:
            DamagedShardError: They cannot.
        """
        tokens, commit = values["tokens"]
        shard = commit.shard
        shards.check_tokens(self.spec, commit, tokens)
        lengths = tokens["lengths"].astype(np.int64)
        mask = tokens["loss_mask"].astype(bool)
        rows = target_digest = None
        if "target" in values:
            mask = shards.without(mask, lengths, values["target"][1])
        elif len(values) > 1:
            mask = shards.without(mask, lengths, self.commit("target", shard))
        if "target" in values:
            arrays, commit = values["target"]
            shards.check_target(self.stored, commit, arrays, mask)
            rows, target_digest = views.decode(self, arrays), commit.digest
        losses = {}
        counted = mask
        for layer in values:
            if layer.startswith("losses/"):
                arrays, commit = values[layer]
                there = shards.without(mask, lengths, commit)
                shards.check_losses(commit, arrays, there)
                losses[layer.removeprefix("losses/")] = arrays["ce"]
                counted = counted & there
        return Shard(
            index=shard,
            ids=tokens["ids"],
            loss_mask=counted,
            lengths=lengths,
            tokens_digest=values["tokens"][1].digest,
            rows=rows,
            target_digest=target_digest,
            losses=losses,
        )

    def read_arrays(self, layer: str, shard: int) -> dict[str, NDArray[Any]]:
        """Reads the arrays of a shard as they are stored, without padding, and checks them against its commit."""
        return self.read_parts([Part(layer, shard)])[0].arrays

    def read_stored(self, shard: int, layers: Sequence[str] | None = None) -> dict[str, Stored]:
        """Reads what `read_shard` makes a shard of; arguments and errors as there."""
        wanted = dict.fromkeys(("tokens", *(layers if layers is not None else self.layers)))
        return dict(zip(wanted, self.read_parts([Part(layer, shard) for layer in wanted]), strict=True))

    def commit(self, layer: str, shard: int) -> Commit:
        """Returns the commit record of a shard.

        Raises:
            LayerNotFoundError: The layer is not there, or the shard of it is not committed.
            DamagedShardError: The record is not what its name says.
            IdentityError: It is of another model, or computed from something else, than the store holds now.
        """
        path = records.path(self, layer, shard)
        if (layer, shard) not in self._commits:
            (data,) = self.storage.get_many([path], [shards.MAX_COMMIT_BYTES])
            self._keep(records.checked(self, layer, shard, data))
        return self._commits[layer, shard]

    def read_parts(self, parts: Sequence[Part]) -> list[Stored]:
        """Reads parts of shards, all at once; again without the local cache if that holds something else.

        Raises:
            LayerNotFoundError: A layer is not there, or a shard of it is not committed.
            DamagedShardError: What is stored is not what was committed.
            IdentityError: A shard was computed from other values than the store holds now.
        """
        try:
            return self._read_once(parts, cached=True)
        except (DamagedShardError, IdentityError):  # of a store that was made anew at this URL, perhaps
            if self.storage.cache is None:
                raise
        paths = [path for part in parts for path in self._places(part)[0]]
        self.storage.cache.drop([f"{self.storage.root}/{path}" for path in paths])
        return self._read_once(parts, cached=False)

    def _read_once(self, parts: Sequence[Part], *, cached: bool) -> list[Stored]:
        """Reads records and objects, all at once: their paths follow from the specs."""
        places = [self._places(part) for part in parts]
        full = [path for paths, _ in places for path in paths]
        limits = [limit for _, limits in places for limit in limits]
        data = iter(self.storage.get_many(full, limits, cached=cached))
        values = []
        for part, (paths, _) in zip(parts, places, strict=True):
            commit = records.checked(self, part.layer, part.shard, next(data))
            found = [next(data) for _ in paths[1:]]
            values.append(Stored(shards.decode_layer(self.stored, commit, found, part.arrays), commit))
            self._keep(commit)
        return values

    def _places(self, part: Part) -> tuple[list[str], list[int]]:
        """Returns what to read for a part, and how long each may be: its record, then its objects."""
        record = records.path(self, part.layer, part.shard)
        paths, limits = shards.paths(self.stored, part)
        return [record, *paths], [shards.MAX_COMMIT_BYTES, *limits]

    def _keep(self, commit: Commit) -> None:
        with self._lock:
            self._commits[commit.layer, commit.shard] = commit
            while len(self._commits) > CACHED_COMMITS:
                self._commits.popitem(last=False)


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
        storage_options: What the URL's file system needs, such as credentials. Never stored.
        scheme: Truncates rows as they are read, as if they had been dumped so (`views.truncated`).
        cache_dir: Folder of this machine that keeps what is read from a bucket; any number of processes may share it.
        cache_bytes: The most that it may grow to: then what was used before goes, the oldest first, and nothing else.

    Raises:
        StoreNotFoundError: There is no store.
        FormatError: It is of another format version, its metadata is malformed, or says less than is committed.
        MissingDriverError: No installed package opens such a URL.
        ValueError: The URL is blank or of a file, or the stored rows do not hold all that the scheme keeps.
    """
    store = Store(Storage(url, storage_options, None if cache_dir is None else (cache_dir, cache_bytes)))
    check_end(store.storage, store.spec, store.layers["tokens"].index)
    return store if scheme is None else views.truncated(store, scheme)
