"""Stores in a bucket of a real S3 server on loopback: reads, writes, and how failures are reported and retried."""

from __future__ import annotations

import json
import pickle
import socket
import time

import fsspec
import numpy as np
import pytest

import logitstore
from logitstore.commands import main as cli
from logitstore.errors import StorageError, StorageRefusedError
from logitstore.storage.storage import Storage
from logitstore.store.writer import LayerWriter, create_store
from tests.helpers import stores
from tests.helpers.faults import FaultyProxy, S3Server, s3_options


@pytest.fixture(scope="module")
def server():
    with S3Server() as server:
        server.make_bucket("bucket")
        yield server


@pytest.fixture(scope="module")
def bucket(server):
    """fsspec options of a bucket named `bucket`."""
    return s3_options(server.url)


@pytest.fixture
def proxy(server):
    with FaultyProxy(server.url) as proxy:
        yield proxy


def test_a_store_written_to_a_bucket_reads_the_same(bucket, tiny_store):
    local = logitstore.open(tiny_store)
    storage = Storage("s3://bucket/deep/cache.zarr", bucket)
    create_store(storage, local.spec)
    tokens = LayerWriter(storage, local.spec, "tokens")
    for shard in range(local.num_shards):
        commit = local.reader.commit("tokens", shard)
        tokens.write(
            shard, local.reader.read_arrays("tokens", shard), documents=commit.documents, rows=commit.rows,
            counted=commit.counted, computed_from=None, started=0.0,
        )  # fmt: skip
    remote = logitstore.open("s3://bucket/deep/cache.zarr", storage_options=bucket)
    assert (remote.num_documents, remote.num_rows) == (local.num_documents, local.num_rows)
    np.testing.assert_array_equal(remote[13].ids, local[13].ids)
    assert logitstore.verify(remote) == []
    fs = fsspec.filesystem("s3", **bucket)
    assert not any(b"hunter2" in fs.cat_file(path) for path in fs.find("bucket"))


def test_a_store_copied_into_a_bucket_is_the_same_store(bucket, tiny_store, tmp_path, capsys):
    fsspec.filesystem("s3", **bucket).put(tiny_store, "bucket/copied.zarr", recursive=True)
    remote, local = logitstore.open("s3://bucket/copied.zarr", storage_options=bucket), logitstore.open(tiny_store)
    assert sorted(remote.layers) == sorted(local.layers)
    np.testing.assert_array_equal(remote[7].rows.logprobs, local[7].rows.logprobs)
    np.testing.assert_array_equal(remote.gap("reference", "reference")[7], local.gap("reference", "reference")[7])
    for layer in local.layers:
        assert remote.storage.num_bytes(layer) == local.storage.num_bytes(layer)
    options = tmp_path / "options.json"
    options.write_text(json.dumps(bucket))
    assert cli.main(["info", "s3://bucket/copied.zarr", "--storage_options", str(options)]) == 0
    assert "hunter2" not in capsys.readouterr().out


def test_store_written_again_at_a_url_is_read_despite_cached_objects_of_the_old_one(bucket, tmp_path):
    url, cache = "s3://bucket/again.zarr", str(tmp_path / "cache")
    storage = Storage(url, bucket)
    tokens = {"tokens": stores.shard_values(np.random.default_rng(0))["tokens"]}
    for max_length in (stores.MAX_LENGTH, stores.MAX_LENGTH + 1):  # equal tokens give equal names of commit records
        fs = fsspec.filesystem("s3", **bucket)
        if left := fs.find("bucket/again.zarr"):
            fs.rm(left)
        spec = stores.spec_of(1, max_length=max_length)
        create_store(storage, spec)
        stores.write_shard(storage, spec, 0, tokens)
        store = logitstore.open(url, bucket, cache_dir=cache)
        for _ in range(2):  # an object that was dropped from the cache is cached again
            assert store.read_shard(0).ids.tolist() == tokens["tokens"]["ids"].tolist()
        assert list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("folder", ["plain", "run[1]", "what*?", "a b+c&d=é%20"])
def test_folder_names_with_special_characters_are_taken_literally(bucket, folder):
    storage, beside = (Storage(f"s3://bucket/{name}/c.zarr", bucket) for name in (folder, f"{folder}1"))
    for one in (storage, beside):
        for number in range(3):
            one.put(f"a/b/{number}", b"x" * number)
    storage.copy("a/b/2", "a/b/3")
    assert storage.names("a/b") == ["0", "1", "2", "3"]
    assert storage.names_with("a/b", "3") == ["3"]
    assert storage.get_many(["a/b/0", "a/b/3", "a/b/4"], [9] * 3) == [b"", b"xx", None]
    assert storage.num_bytes("a") == 5
    storage.remove("a/b/3")
    assert (storage.names("a/b"), beside.num_bytes("")) == (["0", "1", "2"], 3)


def test_sizes_and_names_take_one_listing_each(bucket, proxy):
    storage = Storage("s3://bucket/listed", s3_options(proxy.url))
    for number in range(20):
        storage.put(f"a/{number}", b"x")
    proxy.counts.clear()
    assert storage.num_bytes("") == 20
    assert len(storage.names("a")) == 20
    assert len(storage.names_with("a", "1")) == 11
    assert proxy.counts == {"LIST": 3}


def test_missing_bucket_is_reported_as_refused(bucket, tiny_store):
    spec = logitstore.open(tiny_store).spec
    with pytest.raises(StorageRefusedError, match=r"there is no bucket or folder to write to at s3://nobucket/c.zarr"):
        create_store(Storage("s3://nobucket/c.zarr", bucket), spec)


@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [(403, "AccessDenied", "permission was denied"), (400, "ExpiredToken", "permission was denied"),
     (403, "SignatureDoesNotMatch", "permission was denied"),
     (400, "InvalidToken", "the credentials are no longer valid"),
     (507, "InsufficientStorage", "there is no space left")],
)  # fmt: skip
@pytest.mark.parametrize("has_answered", [False, True])
def test_refusal_is_not_retried(proxy, status, code, reason, has_answered):
    storage = Storage("s3://bucket/refused", s3_options(proxy.url))
    if has_answered:
        storage.put("zarr.json", b"{}")
    proxy.requests = 0
    proxy.refuse(status, code)
    for does in (lambda: storage.put("zarr.json", b"{}"), lambda: storage.create("a", b""), lambda: storage.names("a")):
        with pytest.raises(StorageRefusedError, match=f"^{reason} for s3://bucket/refused at"):
            does()
    assert proxy.requests == 3


def test_driver_does_not_retry(proxy, monkeypatch):
    """Otherwise the retries of s3fs, botocore and Storage would multiply, and a hanging server would block for long."""
    storage = Storage("s3://bucket/once", s3_options(proxy.url))
    storage.put("zarr.json", b"{}")
    monkeypatch.setattr("logitstore.storage.storage.PATIENCE_S", 0.0)
    for kind in ("error_500", "slow_down_503"):
        proxy.set(rate=1.0, kinds=(kind,))
        proxy.requests = 0
        for does in (lambda: storage.get("zarr.json"), lambda: storage.put("a", b""), lambda: storage.names("a")):
            with pytest.raises(StorageError, match="cannot read or write s3://bucket/once at"):
                does()
        assert proxy.requests == 3
    # aiohttp itself opens another connection if the one kept from the last request has been closed.
    proxy.set(rate=1.0, kinds=("reset_before", "reset_in_body"))
    proxy.requests = 0
    with pytest.raises(StorageError):
        storage.get("zarr.json")
    assert proxy.requests <= 2


def test_number_of_attempts_in_the_options_is_respected(proxy, monkeypatch):
    options = s3_options(proxy.url) | {"config_kwargs": {"retries": {"total_max_attempts": 3, "mode": "standard"}}}
    storage = Storage("s3://bucket/thrice", options)
    proxy.set(rate=1.0, kinds=("error_500",))
    monkeypatch.setattr("logitstore.storage.storage.FIRST_PATIENCE_S", 0.0)
    with pytest.raises(StorageError):
        storage.put("zarr.json", b"{}")
    assert proxy.requests == 3


@pytest.mark.parametrize("listens", [False, True])
def test_address_without_an_answer_is_reported_within_seconds(monkeypatch, listens):
    monkeypatch.setattr("logitstore.storage.storage.FIRST_PATIENCE_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as there:
        options = s3_options(f"http://127.0.0.1:{there.getsockname()[1]}") | {"config_kwargs": {"read_timeout": 1}}
        if not listens:
            there.close()
        started = time.monotonic()
        expected = r"cannot read or write s3://bucket/c.zarr at zarr.json \(.*; check the bucket"
        with pytest.raises(StorageError, match=expected):
            logitstore.open("s3://bucket/c.zarr", options)
        assert time.monotonic() - started < 5


def test_bucket_that_has_answered_once_is_retried(proxy, monkeypatch):
    """A pickled Storage retries too, for an actor that starts while the bucket is busy."""
    monkeypatch.setattr("logitstore.storage.storage.FIRST_PATIENCE_S", 0.0)
    storage = Storage("s3://bucket/patient", s3_options(proxy.url))
    storage.put("zarr.json", b"{}")
    for one in (storage, pickle.loads(pickle.dumps(storage))):
        proxy.force("slow_down_503", operation="GET", times=4)
        assert one.get("zarr.json") == b"{}"
    proxy.force("slow_down_503", operation="GET", times=1)
    with pytest.raises(StorageError):
        Storage("s3://bucket/patient", s3_options(proxy.url)).get("zarr.json")
    assert proxy.faults["slow_down_503"] == 9


def test_only_failed_objects_are_read_again(proxy):
    storage = Storage("s3://bucket/many", s3_options(proxy.url))
    paths = [f"a/{number:02d}" for number in range(20)]
    storage.for_each(lambda path: storage.put(path, path.encode()), paths)
    proxy.counts.clear()
    proxy.force("error_500", operation="GET", path="many/a/07")
    proxy.force("reset_in_body", operation="GET", path="many/a/13")
    assert storage.get_many(paths, [9] * 20) == [path.encode() for path in paths]
    assert proxy.counts == {"GET": 22}


def test_thread_lists_its_own_writes_despite_other_threads(proxy):
    """All threads of a process share one file system. No thread may get a listing cached by another thread."""
    storage = Storage("s3://bucket/threads", s3_options(proxy.url))
    missed = []

    def work(number):
        for i in range(10):
            storage.put(f"a/{number}-{i}", b"x")
            if f"{number}-{i}" not in storage.names("a"):
                missed.append((number, i))

    storage.for_each(work, range(8))
    assert missed == []
    assert proxy.counts == {"PUT": 80, "LIST": 80}


def test_unreadable_bucket_with_documents_is_reported_with_its_url(server, proxy, tmp_path):
    from logitstore.documents.records import open_records
    from logitstore.documents.sources import find_source

    options = s3_options(proxy.url)
    Storage("s3://bucket/data", options).put("d.jsonl", b'{"text": "a"}\n')
    source = find_source("s3://bucket/data/d.jsonl", options)
    proxy.refuse()
    message = r"data must be at a URL that can be read, got data=s3://bucket/data/d.jsonl \(PermissionError: .*; check"
    with pytest.raises(StorageError, match=message):
        find_source("s3://bucket/data/d.jsonl", options)
    with pytest.raises(StorageError, match=message):
        open_records(source, tmp_path, list)
