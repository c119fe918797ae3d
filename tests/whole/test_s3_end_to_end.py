"""Dump and training with a bucket give the same bytes and the same draft as with a folder, and store no credentials.

The stores are opened and verified repeatedly while they are written.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
import torch
from safetensors.torch import load_file

import logitstore
from logitstore.format.layout import layer_arrays
from logitstore.store.reader import CACHED_SHARDS
from tests.helpers.faults import KINDS, FaultyProxy, S3Server
from tests.helpers.paths import ROOT
from tests.helpers.tiny import functions, write_jsonl
from tests.helpers.watching import Watch
from trainer.commands import train as train_command

pytestmark = pytest.mark.long

FAULT_RATE = 0.1
SECRETS = {"key": "AKIAdistinctive1key", "secret": "distinctive2/secret+x", "token": "distinctive3token"}
PAYLOAD = re.compile(r"/(?:c/[0-9]+|[0-9]{6}-[^/]*\.json)$")
"""Paths that training reads for a shard: objects of arrays, and commit records."""


class Watched(FaultyProxy):
    """A proxy that also counts the reads of each path."""

    def __init__(self, *args, **kwargs):
        self.read = Counter()
        super().__init__(*args, **kwargs)

    def _count(self, request):
        if request.operation() == "GET":
            self.read[request.start.split(" ")[1].partition("?")[0]] += 1
        return super()._count(request)

    def payload(self):
        """Returns how often each object of a shard was read."""
        return {path: number for path, number in self.read.items() if PAYLOAD.search(path)}


@dataclass(kw_only=True)
class Place:
    """The location of one store with its data and output, and the credentials for it."""

    store: str
    data: str
    output: Path
    flags: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    options: dict[str, str] | None = None
    """Options with which the test itself reads the store; None for a folder."""
    printed: str = ""
    """Output of all jobs."""

    def start(self, name, *arguments):
        """Starts one of the jobs."""
        job = [sys.executable, ROOT / "jobs" / name, "--store", self.store, *self.flags, *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(job, env=os.environ | self.environment, stdout=pipe, stderr=pipe, text=True)

    def finish(self, job):
        """Waits for a job, and returns its stdout."""
        output, errors = job.communicate(timeout=280)
        self.printed += output + errors
        assert (job.returncode, "Traceback" in errors) == (0, False), errors
        return output

    def start_dump(self, tiny):
        return self.start(
            "dump_logits.py", "--data", self.data, "--target", tiny.target, "--reference", f"ref={tiny.reference}",
            "--max_length", "192", "--shard_rows", "1024", "--k", "8", "--num_proc", "1", "--num_actors", "1",
            "--cpus_per_actor", "1", "--batch_tokens", "256", "--no_progress", "--json",
        )  # fmt: skip

    def train(self, tiny, output="draft", *, in_process=False, **more):
        """Trains two epochs with AdaSPEC. Returns the weights of the draft."""
        values = {
            "draft": tiny.draft, "output_dir": self.output / output, "selection": "adaspec", "reference": "ref",
            "num_train_epochs": 2, "per_device_train_batch_size": 4, "learning_rate": 0.01, "no_progress": "true",
            "use_cpu": "true", "report_to": "none", "shuffle_window": 2, **more,
        }  # fmt: skip
        flags = [str(part) for name, value in values.items() for part in (f"--{name}", value)]
        if in_process:  # avoids importing everything again
            train_command.run(["--store", self.store, *self.flags, *flags])
        else:
            self.finish(self.start("train_draft.py", *flags))
        return load_file(self.output / output / "model.safetensors")

    def objects(self):
        """Returns the content of every file of the store, by path."""
        if self.options is None:
            files = [path for path in Path(self.store).rglob("*") if path.is_file()]
            return {str(path.relative_to(self.store)): path.read_bytes() for path in files}
        fs = fsspec.filesystem("s3", **self.options)
        root = self.store.removeprefix("s3://")
        return {path.removeprefix(f"{root}/"): fs.cat_file(path) for path in fs.find(root)}


@pytest.fixture(scope="module")
def written():
    """A folder for all files of this module. Its path is short because Ray's sockets require it."""
    folder = Path(tempfile.mkdtemp(prefix="s3-"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def cluster(written):
    """A Ray cluster without any storage options."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(written / "datasets"))
        patch.setenv("TMPDIR", str(written))
        context = ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=str(written / "ray"))
        patch.setenv("RAY_ADDRESS", context.address_info["gcs_address"])
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def proxy(cluster):
    with S3Server() as server, Watched(server.url, seed=1, kinds=KINDS) as proxy:
        server.make_bucket("bucket")
        yield proxy


@pytest.fixture(scope="module")
def data(written):
    return write_jsonl(written / "data.jsonl", functions(30))


@pytest.fixture(scope="module")
def dumped(proxy, tiny, data, written, tmp_path_factory):
    """Two dumps at once, to a folder and to a bucket, both watched; and a draft trained from the folder."""
    options = SECRETS | {"endpoint_url": proxy.url}
    fsspec.filesystem("s3", **options).put(data, "bucket/data.jsonl")
    file = tmp_path_factory.mktemp("secret") / "options.json"
    file.write_text(json.dumps(options))
    folder = Place(store=str(written / "cache.zarr"), data=data, output=written / "folder")
    bucket = Place(
        store="s3://bucket/deep/cache.zarr", data="s3://bucket/data.jsonl", output=written / "bucket",
        flags=["--storage_options", str(file)], options=options,
    )  # fmt: skip
    places = folder, bucket
    jobs = [place.start_dump(tiny) for place in places]
    watches = [Watch(place.store, place.options, place.flags) for place in places]
    while any(job.poll() is None for job in jobs):
        for watch in watches:
            watch.look()
    for place, job in zip(places, jobs, strict=True):
        place.finish(job)
    return SimpleNamespace(folder=folder, bucket=bucket, watches=watches, draft=folder.train(tiny, in_process=True))


def test_stores_are_valid_at_every_look_during_a_dump(dumped):
    for watch in dumped.watches:
        assert watch.partial > 0
        watch.look()
        assert watch.seen["tokens"] == watch.seen["target"] == watch.seen["losses/ref"] == watch.seen["shards"]


def test_bucket_has_the_same_bytes_as_a_folder(dumped):
    local, remote = dumped.folder.objects(), dumped.bucket.objects()
    assert {name: data for name, data in remote.items() if not is_record(name)} == {
        name: data for name, data in local.items() if not is_record(name)
    }
    assert identities(remote) == identities(local)


def test_training_reads_a_bucket_once_and_gives_the_same_draft(dumped, proxy, tiny, written):
    place, cache = dumped.bucket, written / "cache"
    store = logitstore.open(place.store, place.options)
    assert store.num_shards > CACHED_SHARDS  # so that not all shards fit into memory
    objects = (sum(1 + len(layer_arrays(layer)) for layer in store.layers) - 1) * store.num_shards  # without draws
    proxy.read.clear()
    # The worker process has a copy of the store and of its cache.
    assert same(place.train(tiny, "first", cache_dir=cache, dataloader_num_workers=1), dumped.draft)
    found = proxy.payload()
    assert (len(found), set(found.values())) == (objects, {1})
    proxy.read.clear()
    assert same(place.train(tiny, "again", in_process=True, cache_dir=cache), dumped.draft)
    assert proxy.payload() == {}
    assert 0 < sum(proxy.read.values()) < 20
    assert "storage_options" in (place.output / "first" / "run.yaml").read_text()
    no_credential_in(place, written)


def test_dump_and_training_give_the_same_result_despite_faults(dumped, proxy, tiny, data, written):
    """Only the environment of the jobs has the credentials; the actors receive them with the pickled storage."""
    faulty = Place(
        store="s3://bucket/faulty.zarr", data=data, output=written / "faulty",
        environment={
            "LOGITSTORE_STORAGE_OPTIONS": json.dumps({"endpoint_url": proxy.url, "token": SECRETS["token"]}),
            "FSSPEC_S3_KEY": SECRETS["key"],
            "FSSPEC_S3_SECRET": SECRETS["secret"],
        },
        options=SECRETS | {"endpoint_url": proxy.url},
    )  # fmt: skip
    before = Counter(proxy.faults)
    proxy.set(rate=FAULT_RATE)
    summary = json.loads(faulty.finish(faulty.start_dump(tiny)))
    draft = faulty.train(tiny)
    proxy.set(rate=0.0)
    injected = Counter(proxy.faults) - before
    assert set(injected) == set(KINDS)
    assert injected.total() > 50
    assert same(draft, dumped.draft)
    local, remote = dumped.folder.objects(), faulty.objects()
    assert {name: data for name, data in remote.items() if is_object(name)} == {
        name: data for name, data in local.items() if is_object(name)
    }
    assert identities(remote) == identities(local)
    assert not any(name.startswith("staging/") for name in remote)
    assert not any(summary["set_aside"].values())
    no_credential_in(faulty, written)


def no_credential_in(place, written):
    files = [path for path in written.rglob("*") if path.is_file() and not path.is_symlink()]
    assert {"run.yaml", "model.safetensors"} < {path.name for path in files}
    assert any(path.name.startswith("worker") for path in files)  # the logs of the actors are included
    contents = {str(path): path.read_bytes() for path in files} | place.objects() | {"printed": place.printed.encode()}
    assert len(contents) > 300
    secrets = [secret.encode() for secret in SECRETS.values()]
    assert [name for name, content in contents.items() if any(secret in content for secret in secrets)] == []


def is_record(name):
    """Returns whether a file is a commit record or the store's spec, which contain times, names and paths."""
    return name.startswith("commits/") or name == "zarr.json"


def is_object(name):
    """Returns whether a file is an object with the values of an array."""
    return "/c/" in name


def identities(objects):
    """Returns the fields of the commit records that identify values: digests, checksums and counts."""
    records = {name: json.loads(data) for name, data in objects.items() if name.startswith("commits/")}
    return {
        name: {key: record[key] for key in ("digest", "checksums", "computed_from", "rows", "entries", "counted")}
        for name, record in records.items()
    }


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
