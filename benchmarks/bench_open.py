"""Cost of opening a store with very many committed shards: seconds, bytes and requests.

    python -m benchmarks.bench_open [--num_shards 100000 --s3_shards 1000 5000 20000]

Makes a store whose three layers (tokens, target, losses/reference) have a complete commit record for every shard, and
no objects, because opening reads none. Each figure comes from a new process: `logitstore.open` and its memory,
`locate`, the first `commit`, the time in which a writer looks for the record of a shard (twice per shard), and all of
`logitstore info`. The same rounds measure the lower bound, a bare `os.listdir` of the same three folders. The system's
cache of names and inodes is warm. CPU seconds are shown with wall seconds, which are longer on a busy machine.

Then the same store grows in a bucket of a real S3 server, behind a proxy that counts requests. Opening takes a few
requests, and one listing for every 1,000 records of a layer.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np

import logitstore
from logitstore.format import layout
from logitstore.format.commit import Commit, commit_bytes
from logitstore.format.schemes import Scheme
from logitstore.format.spec import DataSpec, LossSpec, ModelSpec, StoreSpec, TargetSpec, TokenizerSpec, maker
from logitstore.storage.storage import Storage
from logitstore.store import writer
from logitstore.store.commits.index import commits_folder, find_commit

LAYERS = ("tokens", "target", "losses/reference")
BUCKET = "s3://bucket/cache.zarr"
PAGE = 1000
"""Number of names that one S3 request lists."""


# The store


def make_spec(num_shards):
    model = ModelSpec(name="bench", revision="0", dtype="float32", padded_vocab_size=512)
    return StoreSpec(
        tokenizer=TokenizerSpec(name="none", fingerprint="none", vocab_size=512, chat_template=None),
        data=DataSpec(source="none", digest=None, columns="input_ids", mask_policy="all"),
        max_length=512, shard_rows=2**18, num_shards=num_shards,
        target=TargetSpec(model=model, scheme=Scheme(k=64)), losses={"reference": LossSpec(model=model)},
    )  # fmt: skip


def make_store(storage, spec):
    writer.create_store(storage, spec)
    writer.add_layer(storage, spec, "target", spec.target)
    writer.add_layer(storage, spec, "losses/reference", spec.losses["reference"])


def record(spec, layer, shard):
    """Returns path and content of the commit record of a shard that was never computed."""
    below = layout.below(layer)
    own = {"tokens": spec, "target": spec.target}.get(layer, spec.losses["reference"])
    rows = 2**18 - shard % 512
    commit = Commit(
        layer=layer, shard=shard, documents=900 + shard % 100, rows=rows, counted=rows // 2,
        entries=rows * 10 if layer == "target" else 0, digest=digest(layer, shard),
        computed_from=None if below is None else digest(below, shard), made_by=maker(own), seconds=12.345,
        checksums={array.name: f"{shard:08x}" for array in layout.layer_arrays(layer)},
        writer="node-0123:45678", written="2026-11-21T12:00:00+00:00",
    )  # fmt: skip
    return f"{commits_folder(layer)}/{commit.name}", commit_bytes(commit)


def digest(layer, shard):
    return f"sha256:{hashlib.sha256(f'{layer}/{shard}'.encode()).hexdigest()}"


def fill_folder(root, spec):
    """Writes all records as plain files, without the commit protocol."""
    for layer in LAYERS:
        Path(root, commits_folder(layer)).mkdir(parents=True)
        for shard in range(spec.num_shards):
            path, data = record(spec, layer, shard)
            with open(f"{root}/{path}", "xb") as file:
                file.write(data)


def put_records(storage, spec, shards):
    """Writes the records of some shards to a bucket."""
    for layer in LAYERS:
        storage.for_each(lambda shard, layer=layer: storage.put(*record(spec, layer, shard)), shards)


# Measurements, each in a process of its own


def measure_open(url, options=None):
    """Opens the store and prints the cost, without that of loading the driver and connecting."""
    Storage(url, options).get("zarr.json")
    before = memory()
    started, busy = time.perf_counter(), time.process_time()
    store = logitstore.open(url, options)
    opened, done = time.perf_counter(), time.process_time()
    after = memory()
    places = np.random.default_rng(0).integers(store.num_documents, size=10_000).tolist()
    asked = time.perf_counter()
    for place in places:
        store.locate(place)
    located = time.perf_counter()
    store.reader.commit("tokens", store.num_shards // 2)
    read = time.perf_counter()
    find_commit(store.storage, "tokens", store.num_shards // 2)
    found = time.perf_counter()
    result = {
        "open_s": opened - started,
        "open_cpu_s": done - busy,
        "locate_us": (located - asked) / len(places) * 1e6,
        "first_commit_ms": (read - located) * 1e3,
        "writer_looks_ms": (found - read) * 1e3,
        "peak_bytes": after["VmHWM"] - before["VmRSS"],
        "held_bytes": after["VmRSS"] - before["VmRSS"],
        "shards": store.num_shards,
        "left_in_dircache": len(getattr(store.storage._fs, "dircache", ())),
    }
    print(json.dumps(result))


def measure_allocations(url):
    """Opens the store while Python traces allocations, which is slower."""
    tracemalloc.start()
    store = logitstore.open(url)
    gc.collect()
    held, peak = tracemalloc.get_traced_memory()
    print(json.dumps({"traced_held_bytes": held, "traced_peak_bytes": peak, "shards": store.num_shards}))


def measure_floor(root):
    """Lists the folders that opening lists, without using the names."""
    started, busy = time.perf_counter(), time.process_time()
    names = [os.listdir(f"{root}/{commits_folder(layer)}") for layer in LAYERS]
    taken, cpu = time.perf_counter() - started, time.process_time() - busy
    print(json.dumps({"listdir_s": taken, "listdir_cpu_s": cpu, "names": sum(map(len, names))}))


def memory():
    """Returns current and peak memory of this process in bytes. ru_maxrss would include the peak of its parent."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {line[0][:-1]: int(line[1]) * 1024 for line in lines if line[0] in ("VmHWM:", "VmRSS:")}


def fresh(measure, *arguments):
    """Runs one of the measurements above in a new process."""
    code = f"from benchmarks import bench_open; bench_open.{measure.__name__}(*{arguments!r})"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout)


def info_seconds(url):
    started = time.perf_counter()
    command = [sys.executable, "-m", "logitstore.commands.main", "info", url]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started


# Both benchmarks


def bench_folder(num_shards, rounds):
    with tempfile.TemporaryDirectory() as name:
        root = f"{name}/cache.zarr"
        spec = make_spec(num_shards)
        make_store(Storage(root), spec)
        fill_folder(root, spec)
        found = [measure_floor_and_open(root) for _ in range(rounds + 1)][1:]  # the first round is a warm-up
        allocations = fresh(measure_allocations, root)
        info = statistics.median(info_seconds(root) for _ in range(3))
    records = num_shards * len(LAYERS)
    return {
        "shards": num_shards,
        "open_s": spread([one["open_s"] for one in found]),
        "listdir_s": spread([one["listdir_s"] for one in found]),
        "open_over_listdir": spread([one["open_s"] / one["listdir_s"] for one in found]),
        "open_cpu_s": spread([one["open_cpu_s"] for one in found]),
        "listdir_cpu_s": spread([one["listdir_cpu_s"] for one in found]),
        "open_over_listdir_cpu": spread([one["open_cpu_s"] / one["listdir_cpu_s"] for one in found]),
        "locate_us": spread([one["locate_us"] for one in found]),
        "first_commit_ms": spread([one["first_commit_ms"] for one in found]),
        "writer_looks_ms": spread([one["writer_looks_ms"] for one in found]),
        "info_command_s": round(info, 2),
        "resident_bytes_per_record": {
            "peak": round(max(one["peak_bytes"] for one in found) / records),
            "held": round(max(one["held_bytes"] for one in found) / records),
        },
        "allocated_bytes_per_record": {
            "peak": round(allocations["traced_peak_bytes"] / records),
            "held": round(allocations["traced_held_bytes"] / records),
        },
    }


def measure_floor_and_open(root):
    return fresh(measure_floor, root) | fresh(measure_open, root)


def bench_bucket(sizes):
    from tests.helpers.faults import FaultyProxy, S3Server, s3_options

    rows = []
    spec = make_spec(max(sizes))
    with S3Server() as server, FaultyProxy(server.url) as proxy:
        server.make_bucket("bucket")
        storage = Storage(BUCKET, s3_options(server.url))
        make_store(storage, spec)
        there = 0
        for size in sorted(sizes):
            put_records(storage, spec, range(there, size))
            there = size
            before = proxy.counts.copy()
            found = fresh(measure_open, BUCKET, s3_options(proxy.url))
            counts = proxy.counts - before
            # Other requests than those of opening: the GET that connects, the GET of `commit`, and those of a writer.
            counts -= Counter({"GET": 3, "LIST": 1})
            pages = -(-size // PAGE)
            rows.append(
                {
                    "shards": size,
                    "requests": dict(counts),
                    "beyond_listing": sum(counts.values()) - len(LAYERS) * pages,
                    "open_s": round(found["open_s"], 2),
                    "resident_bytes_per_record": {
                        "peak": round(found["peak_bytes"] / size / len(LAYERS)),
                        "held": round(found["held_bytes"] / size / len(LAYERS)),
                    },
                    "left_in_dircache": found["left_in_dircache"],
                }
            )
    return rows


def spread(values):
    return {name: float(f"{f(values):.3g}") for name, f in (("median", statistics.median), ("min", min), ("max", max))}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_shards", type=int, default=100_000, help="in each layer, on the local disk")
    parser.add_argument("--rounds", type=int, default=7, help="fresh processes for each figure")
    parser.add_argument(
        "--s3_shards", type=int, nargs="*", default=[1000, 2000, 5000, 20_000], help="in each layer; none: no bucket"
    )
    args = parser.parse_args(argv)
    load = os.getloadavg()[0]
    result = {
        "folder": bench_folder(args.num_shards, args.rounds),
        "bucket": bench_bucket(args.s3_shards) if args.s3_shards else [],
        "load_before": round(load, 2),
        "load_after": round(os.getloadavg()[0], 2),
        "settings": vars(args),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    print(json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    main()
