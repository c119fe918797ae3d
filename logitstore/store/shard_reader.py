"""Reads whole shards and checks every value against its commit record."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from logitstore.errors import DamagedShardError, IdentityError, LayerNotFoundError
from logitstore.rows import truncating
from logitstore.rows.shard import Shard, without_set_aside
from logitstore.rows.shard_arrays import MAX_COMMIT_BYTES, Part, decode_layer, object_paths
from logitstore.rows.shard_checks import check_losses, check_target, check_tokens

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from logitstore.format.commit import Commit
    from logitstore.format.schemes import Scheme
    from logitstore.format.spec import TargetSpec
    from logitstore.rows.rows import Rows
    from logitstore.store.catalog import Catalog

CACHED_COMMITS = 10_000
"""Maximum number of commit records that are kept in memory. Each takes about 2 kB."""


class Stored(NamedTuple):
    """The stored arrays of one shard of a layer, without padding, and the shard's commit record."""

    arrays: dict[str, NDArray[Any]]
    commit: Commit


class ShardReader:
    """Reads the shards of a store's layers.

    Attributes:
        catalog: The store's layers and commit indexes.
        scheme: Smaller scheme to which target rows are truncated while they are decoded; None keeps all stored entries.
    """

    def __init__(self, catalog: Catalog, scheme: Scheme | None = None) -> None:
        self.catalog = catalog
        self.scheme = scheme
        self._commits: OrderedDict[tuple[str, int], Commit] = OrderedDict()
        self._lock = threading.Lock()

    # A lock cannot be pickled, and commit records are cheap to read again, so neither is copied to another process.

    def __getstate__(self) -> dict[str, Any]:
        return {"catalog": self.catalog, "scheme": self.scheme}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def read_parts(self, parts: Sequence[Part]) -> list[Stored]:
        """Reads parts of shards in one round of requests.

        If objects from the local cache do not match their commit records, all parts are read again from the bucket.

        Raises:
            LayerNotFoundError: The store has no such layer, or a shard is not committed in it.
            DamagedShardError: The stored bytes differ from what was committed.
            IdentityError: Another model made a shard, or a shard was computed from values that the layer below no
                longer holds.
        """
        storage = self.catalog.storage
        try:
            return self._read_once(parts, cached=True)
        except (DamagedShardError, IdentityError):
            # The cached objects may be damaged, or belong to an older store at this URL.
            if storage.cache is None:
                raise
        paths = [path for part in parts for path in self._paths(part)[0]]
        storage.cache.drop([f"{storage.root}/{path}" for path in paths])
        return self._read_once(parts, cached=False)

    def read_arrays(self, layer: str, shard: int) -> dict[str, NDArray[Any]]:
        """Returns the stored arrays of a shard, without padding. Raises the errors of `read_parts`."""
        return self.read_parts([Part(layer, shard)])[0].arrays

    def read_layers(self, shard: int, layers: Iterable[str]) -> dict[str, Stored]:
        """Returns the stored arrays and commit records of a shard in `tokens` and the given layers, by layer name.

        Raises the errors of `read_parts`.
        """
        wanted = dict.fromkeys(("tokens", *layers))
        return dict(zip(wanted, self.read_parts([Part(layer, shard) for layer in wanted]), strict=True))

    def commit(self, layer: str, shard: int) -> Commit:
        """Returns the commit record of a shard, from memory if it was read before.

        Raises:
            LayerNotFoundError: The store has no such layer, or the shard is not committed in it.
            DamagedShardError: The record is malformed, or does not match its file name.
            IdentityError: Another model made the shard, or the shard was computed from values that the layer below no
                longer holds.
        """
        path = self.catalog.record_path(layer, shard)
        if (layer, shard) not in self._commits:
            (data,) = self.catalog.storage.get_many([path], [MAX_COMMIT_BYTES])
            self._keep(self.catalog.check(layer, shard, data))
        return self._commits[layer, shard]

    def assemble(self, values: dict[str, Stored]) -> Shard:
        """Builds a shard from the result of `read_layers`, and checks that its values can occur in an intact store.

        Raises:
            DamagedShardError: A value cannot occur in an intact store, such as a token id beyond the vocabulary.
        """
        spec = self.catalog.spec
        tokens, commit = values["tokens"]
        shard = commit.shard
        check_tokens(spec, commit, tokens)
        lengths = tokens["lengths"].astype(np.int64)
        mask = tokens["loss_mask"].astype(bool)
        # A document that was set aside in `target` has no entries and no losses, whichever layers are read.
        rows = target_digest = None
        if "target" in values:
            mask = without_set_aside(mask, lengths, values["target"][1])
        elif len(values) > 1:
            # Losses are missing for documents that were set aside in the target layer, so the target's commit record is
            # read too.
            mask = without_set_aside(mask, lengths, self.commit("target", shard))
        if "target" in values:
            arrays, commit = values["target"]
            check_target(spec, commit, arrays, mask)
            rows, target_digest = self.decode(arrays), commit.digest
        losses = {}
        counted = mask
        for layer in values:
            if layer.startswith("losses/"):
                arrays, commit = values[layer]
                computed = without_set_aside(mask, lengths, commit)
                check_losses(commit, arrays, computed)
                losses[layer.removeprefix("losses/")] = arrays["ce"]
                # A row counts only if it counts in every layer that was read.
                counted = counted & computed
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

    def decode(self, arrays: dict[str, NDArray[Any]]) -> Rows:
        """Decodes the stored arrays of a target shard into rows, and truncates the rows to the reader's `scheme`.

        Raises:
            LayerNotFoundError: The store has no target layer.
        """
        return truncating.decode(arrays, self._target(), self.scheme)

    def decode_bounds(self, arrays: dict[str, NDArray[Any]]) -> tuple[Rows, Rows]:
        """Decodes the smallest and the largest values that the stored codes allow, for the rows of `decode`.

        Returns:
            First the rows with the smallest logprobs and tail masses, then the rows with the largest.

        Raises:
            LayerNotFoundError: The store has no target layer.
        """
        return truncating.decode_bounds(arrays, self._target(), self.scheme)

    def _target(self) -> TargetSpec:
        if self.catalog.spec.target is None:
            raise LayerNotFoundError(
                f"store must have a target layer, got store={self.catalog.storage.url}; dump the target first"
            )
        return self.catalog.spec.target

    def _read_once(self, parts: Sequence[Part], *, cached: bool) -> list[Stored]:
        """Reads the commit records and the objects of all parts in one round of requests."""
        # Specs and indexes determine all paths, so the objects can be requested before the records are known.
        places = [self._paths(part) for part in parts]
        full = [path for paths, _ in places for path in paths]
        limits = [limit for _, limits in places for limit in limits]
        data = iter(self.catalog.storage.get_many(full, limits, cached=cached))
        values = []
        for part, (paths, _) in zip(parts, places, strict=True):
            commit = self.catalog.check(part.layer, part.shard, next(data))
            found = [next(data) for _ in paths[1:]]
            values.append(Stored(decode_layer(self.catalog.spec, commit, found, part.arrays), commit))
            self._keep(commit)
        return values

    def _paths(self, part: Part) -> tuple[list[str], list[int]]:
        """Returns the paths of a part's commit record and objects, in this order, and their maximum sizes in bytes."""
        record = self.catalog.record_path(part.layer, part.shard)
        paths, limits = object_paths(self.catalog.spec, part)
        return [record, *paths], [MAX_COMMIT_BYTES, *limits]

    def _keep(self, commit: Commit) -> None:
        with self._lock:
            self._commits[commit.layer, commit.shard] = commit
            while len(self._commits) > CACHED_COMMITS:
                self._commits.popitem(last=False)
