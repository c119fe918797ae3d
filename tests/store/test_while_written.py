"""A store is opened, described and verified while two processes write it. test_s3_end_to_end.py does so with a dump."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np

import logitstore
from logitstore.format.spec import Append
from logitstore.storage.storage import Storage
from logitstore.store import writer
from logitstore.store.commits import appends
from tests.helpers import stores
from tests.helpers.faults import S3Server, s3_options
from tests.helpers.paths import environment
from tests.helpers.watching import Watch, counts

LOCAL_SHARDS, S3_SHARDS, APPENDED = 15, 3, 1


def write(url, options, num_shards):
    """Writes a store and an append to it, as fast as possible. Several processes may do the same at once."""
    storage = Storage(url, options)
    spec = stores.spec_of(num_shards)
    writer.create_store(storage, spec)
    values = [stores.shard_values(np.random.default_rng(shard)) for shard in range(num_shards + APPENDED)]
    for shard in range(num_shards):
        stores.write_shard(storage, spec, shard, {"tokens": values[shard]["tokens"]})
    writer.add_layer(storage, spec, "target", spec.target)
    for name, loss in spec.losses.items():
        writer.add_layer(storage, spec, f"losses/{name}", loss)
    for shard in range(num_shards):
        stores.write_shard(storage, spec, shard, values[shard])
    append = Append(data=spec.data, first_shard=num_shards, num_shards=APPENDED)
    if appends.read_appends(storage, spec) == ():
        appends.claim(storage, 1, append)
        for shard in range(num_shards, num_shards + APPENDED):
            stores.write_shard(storage, spec, shard, {"tokens": values[shard]["tokens"]})
        spec = dataclasses.replace(spec, num_shards=num_shards + APPENDED)
        writer.make_room(storage, spec, "tokens")
        appends.write_append(storage, 1, append)
        appends.drop_claim(storage, 1)
    for layer in stores.LAYERS[1:]:
        writer.make_room(storage, spec, layer)
    for shard in range(num_shards, num_shards + APPENDED):
        stores.write_shard(storage, spec, shard, values[shard])


def watch_two_writers(url, options, flags, num_shards):
    watch = Watch(url, options, flags)
    run = [sys.executable, __file__, url, json.dumps(options), str(num_shards)]
    writers = [subprocess.Popen(run, stderr=subprocess.PIPE, text=True, env=environment()) for _ in range(2)]
    while any(process.poll() is None for process in writers):
        watch.look()
    said = [process.communicate()[1] for process in writers]
    # Output is allowed: zarr gives its thread 0.2 s to end, and prints a warning if a busy machine takes longer.
    assert [process.returncode for process in writers] == [0, 0], said
    watch.look()
    store = logitstore.open(url, options)
    assert watch.seen == counts(store)
    assert {watch.seen[name] for name in ("shards", *stores.LAYERS)} == {num_shards + APPENDED}
    assert watch.partial > 0
    assert not any(store.storage.names(f"staging/{layer}") for layer in stores.LAYERS)


def test_folder_written_by_two_processes_is_valid_at_every_look(tmp_path):
    watch_two_writers(str(tmp_path / "c.zarr"), None, [], LOCAL_SHARDS)


def test_bucket_written_by_two_processes_is_valid_at_every_look(tmp_path):
    with S3Server() as server:
        server.make_bucket("bucket")
        options = s3_options(server.url)
        file = tmp_path / "options.json"
        file.write_text(json.dumps(options))
        watch_two_writers("s3://bucket/c.zarr", options, ["--storage_options", str(file)], S3_SHARDS)


if __name__ == "__main__":
    write(sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]))
