"""The processes of a torture run that write a store, and the one that reads it meanwhile, without torch and Ray.

A parent imports this module and forks, so nothing here may start a thread or an event loop before `write` or `read`.
"""

from __future__ import annotations

import os
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import s3fs  # noqa: F401 - imported before forking, because it takes a second

from benchmarks import _torture_rows as rows
from logitstore.documents.tokens_layer import write_part
from logitstore.errors import StorageError, StorageRefusedError, StoreNotFoundError
from logitstore.format.commit import layer_digest
from logitstore.storage.storage import Storage
from logitstore.store import writer
from logitstore.store.reader import Store

GAVE_UP = 75
"""Exit status of a process that gave up because the bucket failed too often. It must be started again."""


START = "start"
"""Step of a writer before its first shard."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Work of one process."""

    url: str
    options: dict | None
    seed: int
    """Seed of the order of shards."""
    variant: int
    append: bool
    threads: int
    """Number of shards written at once."""
    again: bool
    """Whether it also writes shards that are already committed."""
    log: str
    """File for its stderr. A file beside it contains its current step."""


class TracedStorage(Storage):
    """Records the last step in a file, so that the process can be killed at a chosen step."""

    def __init__(self, url, options, steps):
        super().__init__(url, options)
        self._file = os.open(steps, os.O_WRONLY | os.O_CREAT)
        self.has_begun = False

    def step(self, name):
        os.pwrite(self._file, f"{name if self.has_begun else START:<10}".encode(), 0)

    def names(self, path):
        self.step("look")
        return super().names(path)

    def names_with(self, path, prefix):
        self.step("look")
        return super().names_with(path, prefix)

    def get_many(self, paths, limits, *, cached=False):
        self.step("look")
        return super().get_many(paths, limits, cached=cached)

    def put(self, path, data):
        self.step({"staging": "stage", "commits": "commit"}.get(path.partition("/")[0], "metadata"))
        super().put(path, data)

    def create(self, path, data):
        self.step("elect" if path.startswith("staging/") else "metadata")
        return super().create(path, data)

    def copy(self, source, path):
        self.step("publish")
        super().copy(source, path)

    def remove(self, path):
        self.step("clean" if path.startswith("staging/") else "publish")
        super().remove(path)

    def remove_folder(self, path):
        self.step("clean")
        super().remove_folder(path)


def write(job):
    """Writes all layers of all shards, beside other writers."""
    _leave_traces(job.log)
    try:
        write_all(job)
    except StorageRefusedError:
        raise
    except StorageError as error:
        print(error, file=sys.stderr)
        sys.exit(GAVE_UP)


def write_all(job):
    """Creates the store and its layers if they do not exist, and writes the missing shards."""
    storage, rng = TracedStorage(job.url, job.options, f"{job.log}.step"), random.Random(job.seed)
    writer.create_store(storage, rows.SPEC)
    if job.append:
        write_part(storage, rows.MORE, rows.Appended(), append=True)
    spec = Store(storage).spec
    writer.add_layer(storage, spec, "target", rows.TARGET)
    writer.add_layer(storage, spec, rows.LOSSES, rows.REFERENCE)
    store = Store(storage)
    writers = {layer: writer.LayerWriter(storage, store.spec, layer) for layer in rows.LAYERS}
    shards = list(range(store.spec.num_shards))
    rng.shuffle(shards)
    there = {shard for shard in shards if all(shard in store.layers[layer].committed for layer in rows.LAYERS)}
    shards = [shard for shard in shards if job.again or shard not in there]
    storage.has_begun = True
    with ThreadPoolExecutor(job.threads) as pool:
        list(pool.map(lambda shard: write_shard(storage, writers, shard, job.variant), shards))


def write_shard(storage, writers, shard, variant):
    """Writes one shard of all layers. The losses are computed from the committed rows."""
    storage.step("compute")
    started = time.monotonic()
    own = rows.tokens(shard)
    size = {
        "documents": len(own["lengths"]), "rows": len(own["ids"]), "counted": int(own["loss_mask"].sum()),
        "started": started,
    }  # fmt: skip
    commit = writers["tokens"].write(shard, own, computed_from=None, **size)
    own = rows.target(shard, variant)
    commit = writers["target"].write(shard, own, computed_from=commit.digest, **size)
    if commit.digest != layer_digest("target", own):
        own = Store(storage).reader.read_arrays("target", shard)
    writers[rows.LOSSES].write(shard, rows.losses(own), computed_from=commit.digest, **size)


def read(job, stop):
    """Reads the store repeatedly until the file `stop` exists. Every shard must be exactly that of one writer.

    Raises:
        ValueError: A row was read that no writer has written.
    """
    _leave_traces(job.log)
    storage, rng, num_rows = Storage(job.url, job.options), random.Random(job.seed), 0
    while not Path(stop).exists():
        try:
            num_rows += _read(storage, rng)
        except StoreNotFoundError:
            time.sleep(0.01)
        except StorageRefusedError:
            raise
        except StorageError as error:
            print(error, file=sys.stderr)
    Path(stop).write_text(str(num_rows))


def _read(storage, rng):
    store = Store(storage)
    num_rows = 0
    for _ in range(4):
        layers = rows.LAYERS[: rng.randint(1, len(rows.LAYERS))]
        if not store.layers.keys() >= set(layers):
            continue
        # After a shard was taken back, shards computed from it can exist before it is written again.
        there = frozenset.intersection(*(store.layers[name].committed - store.layers[name].stale for name in layers))
        if not there:
            continue
        shard = rng.choice(sorted(there))
        values = store.reader.read_layers(shard, layers)
        store.reader.assemble(values)
        read = {name: value.arrays for name, value in values.items()}
        if not rows.same(read["tokens"], rows.tokens(shard)):
            raise ValueError(f"tokens of shard {shard} must be as written, got others")
        if "target" in read and not any(rows.same(read["target"], rows.target(shard, v)) for v in range(rows.VARIANTS)):
            raise ValueError(f"target rows of shard {shard} must be one writer's, got a mixture")
        if rows.LOSSES in read and not rows.same(read[rows.LOSSES], rows.losses(read["target"])):
            raise ValueError(f"losses of shard {shard} must be of the rows that are there, got others")
        num_rows += len(read["tokens"]["ids"])
    time.sleep(0.02 if storage.is_local else 0.5)  # leaves time for the writers
    return num_rows


def _leave_traces(log):
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), sys.stderr.fileno())
