"""Compares a finished store with undisturbed ones: every object byte for byte, and every row.

There is one undisturbed store for each variant of the values. Each shard, with the layers computed from it, must equal
that of one variant completely.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field

import fsspec
import numpy as np

from logitstore.errors import LogitStoreError
from logitstore.format.layout import layer_arrays
from logitstore.inspection.verify import verify
from logitstore.storage.local_disk import PARTIAL
from logitstore.storage.storage import Storage
from logitstore.store.commits.index import commit_names
from logitstore.store.reader import Store

PLACE = re.compile(r"(?:commits/)?(tokens|target|losses/[^/]+)/(?:[^/]+/c/([0-9]+)|([0-9]+)-[^/]*\.json)")
"""Paths of files that belong to one shard of a layer."""
VOLATILE = ("seconds", "writer", "written", "crc32c")
"""Fields of a commit record that differ between runs, and the checksum over them."""


@dataclass(kw_only=True)
class Verdict:
    """The differences between a finished store and an undisturbed one."""

    rows: int = 0
    """Number of compared rows of all layers."""
    lost: int = 0
    doubled: int = 0
    mixed: int = 0
    """Rows that are missing, present twice, or not as any single writer computed them."""
    differences: list[str] = field(default_factory=list)
    """Descriptions of all differences."""


class Oracle:
    """The undisturbed stores to compare with."""

    def __init__(self, urls):
        self._stores = [Store(Storage(url)) for url in urls]
        self._files = [snapshot(url) for url in urls]
        self._layers = list(self._stores[0].layers)
        self._num_shards = self._stores[0].num_shards
        self._arrays = [
            [
                {layer: store.reader.read_arrays(layer, shard) for layer in self._layers}
                for shard in range(self._num_shards)
            ]
            for store in self._stores
        ]

    def compare(self, url, options=None):
        """Returns the differences of a store that should be finished."""
        verdict = Verdict()
        found = snapshot(url, options)
        chosen = [self._variant(found, shard) for shard in range(self._num_shards)]
        verdict.differences += [f"staging is not empty: {path}" for path in found if path.startswith("staging/")]
        wanted = {
            path: data
            for variant, files in enumerate(self._files)
            for path, data in files.items()
            if variant == (chosen[place[1]] if (place := shard_of(path)) and place[0] != "tokens" else 0)
        }
        for path in sorted(wanted.keys() | found.keys()):
            if not path.startswith("staging/") and (reason := different(path, wanted.get(path), found.get(path))):
                verdict.differences.append(f"{path}: {reason}")
        try:
            store = Store(Storage(url, options))
            self._compare_rows(store, chosen, verdict)
            verdict.differences += [f"verify: {problem}" for problem in verify(store)]
        except LogitStoreError as error:
            verdict.differences.append(f"cannot be read: {error}")
            verdict.lost = max(verdict.lost, self._stores[0].num_rows)
            return verdict
        for what in ("num_documents", "num_rows", "num_counted", "num_shards"):
            expected, actual = getattr(self._stores[0], what), getattr(store, what)
            if expected != actual:
                verdict.differences.append(f"{what} is {actual}, not {expected}")
        return verdict

    def _variant(self, found, shard):
        """Returns the undisturbed store whose rows a shard has; the first one if there is none."""
        names = {path for path in found if path.startswith("commits/target/") and shard_of(path) == ("target", shard)}
        return next((i for i, files in enumerate(self._files) if not names.isdisjoint(files)), 0)

    def _compare_rows(self, store, chosen, verdict):
        """Counts the rows that a reader finds lost, doubled or mixed."""
        wanted, there = Counter(), Counter()
        for shard in range(max(self._num_shards, store.num_shards)):
            arrays = self._arrays[chosen[shard]][shard] if shard < self._num_shards else {}
            num_rows = len(arrays["tokens"]["ids"]) if arrays else 0
            verdict.rows += num_rows * len(arrays)
            wanted.update(documents(arrays))
            read = {}
            for layer in self._layers:
                if len(records := commit_names(store.storage, layer, shard)) > 1:
                    verdict.doubled += num_rows
                    verdict.differences.append(f"{layer}/{shard} has {len(records)} records")
                try:
                    read[layer] = store.reader.read_arrays(layer, shard)
                except LogitStoreError as error:
                    verdict.lost += num_rows if layer != "tokens" else 0  # rows of tokens are counted by document
                    verdict.differences.append(f"{layer}/{shard} cannot be read: {error}")
            there.update(documents(read))
            for layer in read.keys() & arrays.keys():
                mixed = num_different(layer, arrays, read)
                verdict.mixed += mixed
                if mixed:
                    verdict.differences.append(f"{layer}/{shard} has {mixed} rows that are not one writer's")
        for document, more in (there - wanted).items():
            num_rows = len(document[0]) // 4 * more
            if document in wanted:
                verdict.doubled += num_rows
            else:
                verdict.mixed += num_rows
        verdict.lost += sum(len(document[0]) // 4 * less for document, less in (wanted - there).items())


def snapshot(url, options=None):
    """Returns the content of every object of a store, by path, without the partial files of killed writers."""
    fs, root = fsspec.url_to_fs(url, **(options or {}))
    fs.invalidate_cache()
    paths = [path for path in fs.find(root) if not path.endswith(PARTIAL)]
    return {path.removeprefix(f"{root}/"): data for path, data in (fs.cat(paths) if paths else {}).items()}


def shard_of(path):
    """Returns the layer and the shard that an object belongs to; None if it belongs to no shard."""
    found = PLACE.fullmatch(path)
    return None if found is None else (found[1], int(found[2] or found[3]))


def different(path, wanted, found):
    """Returns a description of the difference between an object and the expected one; empty if they are equal."""
    if wanted is None or found is None:
        return "is not there" if found is None else "should not be there"
    if wanted == found:
        return ""
    if path.startswith("commits/"):
        records = [json.loads(data) for data in (wanted, found)]
        fields = records[0].keys() | records[1].keys()
        changed = sorted(name for name in fields - set(VOLATILE) if records[0].get(name) != records[1].get(name))
        return f"differs in {', '.join(changed)}" if changed else ""
    return f"{len(found)} bytes differ from the {len(wanted)} that should be there"


def documents(arrays):
    """Returns ids and mask of each document of a shard as bytes, so that they can be counted."""
    if "tokens" not in arrays:
        return []
    ids, mask = arrays["tokens"]["ids"], arrays["tokens"]["loss_mask"]
    ends = np.cumsum(arrays["tokens"]["lengths"], dtype=np.int64)
    return [
        (ids[end - n : end].tobytes(), mask[end - n : end].tobytes())
        for end, n in zip(ends.tolist(), arrays["tokens"]["lengths"].tolist(), strict=True)
    ]


def num_different(layer, wanted, read):
    """Counts the rows of a shard of a layer that differ from the expected ones; 0 for tokens, compared by document."""
    if layer == "tokens":
        return 0
    if all(values.tobytes() == read[layer][name].tobytes() for name, values in wanted[layer].items()):
        return 0
    pairs = zip(_rows(layer, wanted[layer]), _rows(layer, read[layer]), strict=False)
    return max(1, sum(one != other for one, other in pairs))


def _rows(layer, arrays):
    """Returns the values of each row as bytes."""
    num_rows = len(next(iter(arrays.values())))
    counts = arrays["counts"].astype(np.int64) if "counts" in arrays else np.zeros(num_rows, np.int64)
    starts = np.cumsum(counts) - counts
    entries = {array.name for array in layer_arrays(layer) if array.per == "entry"}
    return [
        b"|".join(
            values[starts[i] : starts[i] + counts[i]].tobytes() if name in entries else values[i].tobytes()
            for name, values in arrays.items()
        )
        for i in range(num_rows)
    ]
