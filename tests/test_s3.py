"""A store in a bucket: a real S3 server over HTTP, on loopback; what its failures become, and how soon."""

from __future__ import annotations

import json
import pickle
import socket
import time

import fsspec
import numpy as np
import pytest
import stores
from faults import FaultyProxy, S3Server, s3_options

import logitstore
from logitstore import cli
from logitstore.errors import StorageError, StorageRefusedError
from logitstore.storage.storage import Storage
from logitstore.store.writer import LayerWriter, create_store


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


def test_a_store_made_anew_at_a_url_is_read_past_what_the_cache_has_of_the_old_one(bucket, tmp_path):
    url, cache = "s3://bucket/again.zarr", str(tmp_path / "cache")
    storage = Storage(url, bucket)
    tokens = {"tokens": stores.shard_values(np.random.default_rng(0))["tokens"]}
    for max_length in (stores.MAX_LENGTH, stores.MAX_LENGTH + 1):  # the same tokens: their records are named the same
        fs = fsspec.filesystem("s3", **bucket)
        if left := fs.find("bucket/again.zarr"):
            fs.rm(left)
        spec = stores.spec_of(1, max_length=max_length)
        create_store(storage, spec)
        stores.write_shard(storage, spec, 0, tokens)
        store = logitstore.open(url, bucket, cache_dir=cache)
        for _ in range(2):  # what was dropped is kept again
            assert store.read_shard(0).ids.tolist() == tokens["tokens"]["ids"].tolist()
        assert list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("folder", ["plain", "run[1]", "what*?", "a b+c&d=é%20"])
def test_any_name_of_a_folder_is_that_folder(bucket, folder):
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


def test_sizes_and_names_take_one_listing(bucket, proxy):
    storage = Storage("s3://bucket/listed", s3_options(proxy.url))
    for number in range(20):
        storage.put(f"a/{number}", b"x")
    proxy.counts.clear()
    assert storage.num_bytes("") == 20
    assert len(storage.names("a")) == 20
    assert len(storage.names_with("a", "1")) == 11
    assert proxy.counts == {"LIST": 3}


def test_a_bucket_that_is_not_there_is_one_clear_error(bucket, tiny_store):
    spec = logitstore.open(tiny_store).spec
    with pytest.raises(StorageRefusedError, match=r"url must be one that can be written, got url=s3://nobucket/c.zarr"):
        create_store(Storage("s3://nobucket/c.zarr", bucket), spec)


@pytest.mark.parametrize(
    ("status", "code"),
    [(403, "AccessDenied"), (400, "ExpiredToken"), (403, "SignatureDoesNotMatch"), (400, "InvalidToken"),
     (507, "InsufficientStorage")],
)  # fmt: skip
@pytest.mark.parametrize("has_answered", [False, True])
def test_a_refusal_is_not_tried_again(proxy, status, code, has_answered):
    storage = Storage("s3://bucket/refused", s3_options(proxy.url))
    if has_answered:
        storage.put("zarr.json", b"{}")
    proxy.requests = 0
    proxy.refuse(status, code)
    for does in (lambda: storage.put("zarr.json", b"{}"), lambda: storage.create("a", b""), lambda: storage.names("a")):
        with pytest.raises(StorageRefusedError, match=r"url must be one that may be .* got url=s3://bucket/refused at"):
            does()
    assert proxy.requests == 3


def test_the_driver_tries_nothing_again_by_itself(proxy, monkeypatch):
    """Or a server that hangs would be waited for as often as s3fs, botocore and Storage multiply to."""
    storage = Storage("s3://bucket/once", s3_options(proxy.url))
    storage.put("zarr.json", b"{}")
    monkeypatch.setattr("logitstore.storage.storage.PATIENCE_S", 0.0)
    for kind in ("error_500", "slow_down_503"):
        proxy.set(rate=1.0, kinds=(kind,))
        proxy.requests = 0
        for does in (lambda: storage.get("zarr.json"), lambda: storage.put("a", b""), lambda: storage.names("a")):
            with pytest.raises(StorageError, match="url must be one that can be reached, got url=s3://bucket/once at"):
                does()
        assert proxy.requests == 3
    # A connection that was kept from the request before may have been closed since: aiohttp tries another.
    proxy.set(rate=1.0, kinds=("reset_before", "reset_in_body"))
    proxy.requests = 0
    with pytest.raises(StorageError):
        storage.get("zarr.json")
    assert proxy.requests <= 2


def test_a_users_own_number_of_tries_is_heeded(proxy, monkeypatch):
    options = s3_options(proxy.url) | {"config_kwargs": {"retries": {"total_max_attempts": 3, "mode": "standard"}}}
    storage = Storage("s3://bucket/thrice", options)
    proxy.set(rate=1.0, kinds=("error_500",))
    monkeypatch.setattr("logitstore.storage.storage.FIRST_PATIENCE_S", 0.0)
    with pytest.raises(StorageError):
        storage.put("zarr.json", b"{}")
    assert proxy.requests == 3


@pytest.mark.parametrize("listens", [False, True])
def test_an_address_where_nothing_answers_is_told_soon(monkeypatch, listens):
    monkeypatch.setattr("logitstore.storage.storage.FIRST_PATIENCE_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as there:
        options = s3_options(f"http://127.0.0.1:{there.getsockname()[1]}") | {"config_kwargs": {"read_timeout": 1}}
        if not listens:
            there.close()
        started = time.monotonic()
        with pytest.raises(StorageError, match=r"got url=s3://bucket/c.zarr at zarr.json \(.*; check the bucket"):
            logitstore.open("s3://bucket/c.zarr", options)
        assert time.monotonic() - started < 5


def test_a_bucket_that_has_answered_is_waited_for(proxy, monkeypatch):
    """Also by the copy of a Storage in another process: an actor that starts while the bucket is busy."""
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


def test_only_what_failed_is_read_again(proxy):
    storage = Storage("s3://bucket/many", s3_options(proxy.url))
    paths = [f"a/{number:02d}" for number in range(20)]
    storage.for_each(lambda path: storage.put(path, path.encode()), paths)
    proxy.counts.clear()
    proxy.force("error_500", operation="GET", path="many/a/07")
    proxy.force("reset_in_body", operation="GET", path="many/a/13")
    assert storage.get_many(paths, [9] * 20) == [path.encode() for path in paths]
    assert proxy.counts == {"GET": 22}


def test_a_thread_lists_what_it_wrote_whatever_others_list(proxy):
    """One file system serves all threads of a process: none may get what another has listed before."""
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


def test_documents_in_a_bucket_that_cannot_be_read_are_one_clear_error(server, proxy, tmp_path):
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
