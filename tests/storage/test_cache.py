"""The local cache of a bucket's objects, tested with a real S3 server, several processes and a full disk."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import multiprocessing
import os
import pickle
import random
import resource
import time
from types import SimpleNamespace

import fsspec
import pytest

from logitstore.storage.cache import ReadThroughCache, fetch
from tests.helpers.faults import S3Server, s3_options


@pytest.fixture(scope="module")
def server():
    """fsspec options of an S3 server with an empty bucket named `bucket`."""
    with S3Server() as server:
        server.make_bucket("bucket")
        yield s3_options(server.url)


@pytest.fixture
def bucket(server):
    fs = fsspec.filesystem("s3", **server)
    yield fs
    fs.invalidate_cache()
    if left := fs.find("bucket"):
        fs.rm(left)


@pytest.fixture
def local(tmp_path):
    """A local folder that stands for a bucket, with five objects of 100 bytes."""
    folder = tmp_path / "objects"
    folder.mkdir()
    for name in "abcde":
        (folder / name).write_bytes(name.encode() * 100)
    return folder


def local_cache(tmp_path, max_bytes, folder="cache"):
    return ReadThroughCache(fsspec.filesystem("file"), tmp_path / folder, max_bytes)


def read(cache, *paths, limit=1000):
    return cache.read([str(path) for path in paths], [limit] * len(paths))


def held(cache):
    """Returns the names of the objects of `local` that are in a cache."""
    return "".join(sorted(path.read_text()[0] for path in cache.folder.iterdir()))


def held_bytes(folder):
    total = 0
    for path in folder.iterdir() if folder.exists() else ():
        with contextlib.suppress(FileNotFoundError):  # evicted by another process just now
            total += path.stat().st_size
    return total


def test_cached_objects_are_read_without_the_bucket(bucket, tmp_path):
    objects = {f"bucket/s/{name}": os.urandom(1000) for name in "abc"}
    bucket.pipe(objects)
    cache = ReadThroughCache(bucket, tmp_path / "cache", 10_000)
    assert read(cache, *objects) == list(objects.values())
    bucket.rm(list(objects))
    assert read(cache, *objects) == list(objects.values())
    assert isinstance(fetch(bucket, ["bucket/s/a"], [1000])[0], FileNotFoundError)
    # The same holds for another process with a pickled cache, or with its own cache on the same folder.
    assert read(pickle.loads(pickle.dumps(cache)), *objects) == list(objects.values())
    assert read(ReadThroughCache(bucket, tmp_path / "cache", 10_000), "bucket/s/b") == [objects["bucket/s/b"]]


def test_missing_object_fails_alone_and_is_requested_again(bucket, tmp_path):
    bucket.pipe({"bucket/a": b"a", "bucket/c": b"c"})
    cache = ReadThroughCache(bucket, tmp_path / "cache", 10_000)
    a, b, c, nowhere = read(cache, "bucket/a", "bucket/b", "bucket/c", "nobucket/a")
    assert (a, c) == (b"a", b"c")
    assert isinstance(b, FileNotFoundError)
    assert isinstance(nowhere, FileNotFoundError)
    bucket.pipe("bucket/b", b"b")
    assert read(cache, "bucket/b", "bucket/a") == [b"b", b"a"]


def test_object_longer_than_its_limit_is_cut_and_not_cached(bucket, tmp_path):
    bucket.pipe("bucket/a", b"a" * 1000)
    cache = ReadThroughCache(bucket, tmp_path / "cache", 10_000)
    assert read(cache, "bucket/a", limit=999) == [b"a" * 1000]
    assert read(cache, "bucket/a", limit=10) == [b"a" * 11]
    assert held_bytes(tmp_path / "cache") == 0
    assert read(cache, "bucket/a", limit=1000) == [b"a" * 1000]
    assert held_bytes(tmp_path / "cache") == 1000
    assert read(cache, "bucket/a", limit=10) == [b"a" * 11]  # the cached object is cut too


def test_an_empty_object_is_read_as_no_bytes(bucket, tmp_path):
    bucket.pipe({"bucket/empty": b"no more", "bucket/full": b"f"})
    bucket.ls("bucket")  # the file system caches the listing
    fsspec.filesystem("s3", **bucket.storage_options, skip_instance_cache=True).pipe("bucket/empty", b"")
    cache = ReadThroughCache(bucket, tmp_path / "cache", 10_000)
    assert read(cache, "bucket/empty", "bucket/full") == [b"", b"f"]
    bucket.rm("bucket/empty")
    assert read(cache, "bucket/empty") == [b""]


def test_empty_object_is_read_as_no_bytes_over_plain_http(bucket, server):
    for name, data in {"empty": b"", "full": b"full"}.items():
        bucket.pipe_file(f"bucket/{name}", data, ACL="public-read")
    urls = [f"{server['endpoint_url']}/bucket/{name}" for name in ("empty", "full")]
    assert fetch(fsspec.filesystem("http"), urls, [2, 2]) == [b"", b"ful"]


def test_equal_bucket_names_of_two_services_do_not_mix(bucket, server, tmp_path):
    bucket.pipe("bucket/a", b"a")
    elsewhere = server["endpoint_url"].replace("127.0.0.1", "localhost")
    named_inside = {"key": "k", "secret": "s", "client_kwargs": {"endpoint_url": elsewhere}}
    for fs in (bucket, fsspec.filesystem("s3", **server | {"endpoint_url": elsewhere}), bucket):
        assert read(ReadThroughCache(fs, tmp_path, 10_000), "bucket/a") == [b"a"]
    assert len(list(tmp_path.iterdir())) == 2
    fs = fsspec.filesystem("s3", **named_inside)
    assert read(ReadThroughCache(fs, tmp_path, 10_000), "bucket/a") == [b"a"]


def test_equal_paths_of_two_protocols_do_not_mix(local, tmp_path):
    read(local_cache(tmp_path, 1000), local / "a")
    memory = fsspec.filesystem("memory")
    memory.pipe(str(local / "a"), b"memory")
    assert read(ReadThroughCache(memory, tmp_path / "cache", 1000), local / "a") == [b"memory"]
    memory.rm(str(local / "a"))


def test_cache_folder_stays_within_its_bound(local, tmp_path):
    cache = local_cache(tmp_path, 250)
    for name in "abcdeabcde":
        assert read(cache, local / name) == [name.encode() * 100]
        assert held_bytes(cache.folder) <= 250
    assert held_bytes(cache.folder) == 200
    assert [data[:1] for data in read(cache, *(local / name for name in "abcde"))] == [b"a", b"b", b"c", b"d", b"e"]
    assert held_bytes(cache.folder) == 200


def test_objects_of_earlier_runs_are_evicted_oldest_first(local, tmp_path):
    before = local_cache(tmp_path, 300)
    for name in "abca":
        read(before, local / name)
    cache = local_cache(tmp_path, 300)
    read(cache, local / "d")  # evicts b
    assert held(cache) == "acd"
    read(cache, local / "c")  # used again, so it stays
    read(cache, local / "e")
    assert held(cache) == "cde"


def test_objects_of_the_current_run_stay_and_a_full_cache_adds_nothing(local, tmp_path, caplog):
    before = local_cache(tmp_path, 300)
    read(before, local / "a")
    cache = local_cache(tmp_path, 300)
    for name in "bcdea":
        with caplog.at_level(logging.DEBUG, "logitstore"):
            assert read(cache, local / name) == [name.encode() * 100]
    assert held(cache) == "bcd"
    assert [(record.levelno, record.message.partition(" full ")[2]) for record in caplog.records] == [
        (logging.DEBUG, "of files that were used since it was opened: no more files are added")
    ]
    # For the cache opened first, all objects are of the current run; for one opened now, none is.
    assert read(before, local / "e") == [b"e" * 100]
    assert held(cache) == "bcd"
    read(local_cache(tmp_path, 300), local / "e")
    assert held(cache) == "cde"


def test_pickled_caches_keep_the_objects_of_the_current_run(local, tmp_path):
    cache = local_cache(tmp_path, 300)
    read(cache, *(local / name for name in "abc"))
    worker = pickle.loads(pickle.dumps(cache))
    read(worker, local / "d", local / "e")
    assert held(cache) == "abc"


def test_shuffled_reads_hit_as_many_objects_as_fit(tmp_path):
    folder, rng = tmp_path / "objects", random.Random(0)
    folder.mkdir()
    for i in range(40):
        (folder / str(i)).write_bytes(b"%100d" % i)
    cache = local_cache(tmp_path, 1000)
    for epoch in range(4):
        hits = 0
        for i in rng.sample(range(40), 40):
            there = {path.read_bytes() for path in cache.folder.glob("*")}
            (data,) = read(cache, folder / str(i))
            assert data == b"%100d" % i
            hits += data in there
        assert hits == (10 if epoch else 0)


def test_object_larger_than_the_bound_is_read_and_evicts_nothing(local, tmp_path):
    (local / "huge").write_bytes(b"h" * 400)
    cache = local_cache(tmp_path, 300)
    read(cache, *(local / name for name in "abc"))
    assert read(cache, local / "huge") == [b"h" * 400]
    assert held_bytes(cache.folder) == 300


def test_large_cache_folder_is_scanned_only_occasionally(local, tmp_path, monkeypatch):
    monkeypatch.setattr("logitstore.storage.cache.FILES_PER_LOOK", 100)
    folder = tmp_path / "cache"
    folder.mkdir()
    for i in range(250):
        (folder / f"{i:064x}").write_bytes(b"1")
        os.utime(folder / f"{i:064x}", (i, i))
    cache = local_cache(tmp_path, 350)
    read(cache, local / "a")  # the first scan finds 250 + 100 bytes
    read(cache, local / "b")
    read(cache, local / "c")
    assert held_bytes(folder) == 550  # two new files are less than a hundredth, so there was no scan
    read(cache, local / "d")
    assert held_bytes(folder) == 300  # evicting the 250 old files is not enough, so d is evicted too
    assert held(cache) == "abc"


def test_dropped_objects_are_read_from_the_bucket_again(local, tmp_path):
    cache, other = local_cache(tmp_path, 1000), local_cache(tmp_path, 1000)
    read(cache, local / "a", local / "b")
    for name in "ab":
        (local / name).write_bytes(b"repaired")
    assert read(cache, local / "a", local / "b") == [b"a" * 100, b"b" * 100]
    cache.drop([str(local / "a"), str(local / "not there")])
    assert read(other, local / "a", local / "b") == [b"repaired", b"b" * 100]
    (local / "a").unlink()
    assert read(cache, local / "a") == [b"repaired"]


def test_foreign_files_in_the_cache_folder_are_left_alone(local, tmp_path):
    folder = tmp_path / "cache"
    (folder / ("0" * 64)).mkdir(parents=True)
    for name in ("notes.txt", "f" * 63, f"{'f' * 64}.json", f"{'f' * 64}.partial"):
        (folder / name).write_bytes(b"n" * 5000)
    os.utime(folder / "notes.txt", (0, 0))
    kept = {entry.name for entry in os.scandir(folder)} - {"0" * 64}
    cache = local_cache(tmp_path, 300)
    (folder / ("0" * 64)).rmdir()
    for name in "abcde":
        read(cache, local / name)
    names = {entry.name for entry in os.scandir(folder)}
    assert kept <= names
    assert len(names - kept) == 3


def test_partial_files_of_killed_writers_count_and_are_evicted(local, tmp_path):
    cache = local_cache(tmp_path, 300)
    read(cache, local / "a")
    (final,) = cache.folder.iterdir()
    leftover = cache.folder / f"{final.name}.{'0' * 32}.partial"
    leftover.write_bytes(b"a" * 50)
    os.utime(leftover, (1, 1))
    final.unlink()
    assert read(cache, *(local / name for name in "ab")) == [b"a" * 100, b"b" * 100]
    assert leftover.exists()
    read(cache, local / "c")
    assert not leftover.exists()
    assert held_bytes(cache.folder) == 300


def test_unwritable_cache_folder_warns_once_and_reads_continue(local, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    cache = local_cache(tmp_path, 1000, "file/cache")
    for name in "abab":
        assert read(cache, local / name) == [name.encode() * 100]
    cache.drop([str(local / "a")])
    assert read(cache, local / "a") == [b"a" * 100]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message.startswith(f"cannot use the cache folder {tmp_path / 'file' / 'cache'} (")
    assert "Not a directory" in record.message


def test_cached_objects_are_still_used_on_a_full_disk(local, tmp_path, caplog):
    (local / "large").write_bytes(b"l" * 5000)
    cache = local_cache(tmp_path, 100_000)
    read(cache, local / "a")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # a longer write fails half-way, as on a full disk
    try:
        assert read(cache, local / "large", limit=9000) == [b"l" * 5000]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert held_bytes(cache.folder) == 100
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    (local / "a").unlink()
    assert read(cache, local / "a", local / "b") == [b"a" * 100, b"b" * 100]
    assert held_bytes(cache.folder) == 100
    assert len(caplog.records) == 1


@pytest.mark.parametrize("max_bytes", [0, -1])
def test_a_bound_that_is_not_positive_is_refused(tmp_path, max_bytes):
    with pytest.raises(ValueError, match=f"max_bytes must be positive, got max_bytes={max_bytes}; give the bytes"):
        local_cache(tmp_path, max_bytes)


def test_cache_folder_does_not_depend_on_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    fs = fsspec.filesystem("file")
    cache = ReadThroughCache(fs, "here", 1)
    monkeypatch.chdir("/")
    assert pickle.loads(pickle.dumps(cache)).folder == tmp_path / "here"
    assert ReadThroughCache(fs, "~/there", 1).folder == tmp_path / "home" / "there"


NUM_OBJECTS, OBJECT_BYTES, HELD_OBJECTS, AT_ONCE, READS_OF_A_RUN = 12, 400_000, 5, 2, 10


def content(index):
    return hashlib.sha256(str(index).encode()).digest() * (OBJECT_BYTES // 32)


def read_at_random(objects, folder, seed, held, num_reads, started, faults):
    """Reads and sometimes drops objects in one process, and reports the first object with wrong content."""
    rng = random.Random(seed)
    logging.getLogger("logitstore").addHandler(logging.StreamHandler(SimpleNamespace(write=faults.put)))
    expected = [content(i) for i in range(NUM_OBJECTS)]
    started.release()
    for i in range(num_reads):
        if i % READS_OF_A_RUN == 0:  # a new run may evict objects that the other processes added
            cache = ReadThroughCache(fsspec.filesystem("file"), folder, held * OBJECT_BYTES)
        chosen = rng.sample(range(NUM_OBJECTS), AT_ONCE)
        paths = [f"{objects}/{index}" for index in chosen]
        for index, data in zip(chosen, cache.read(paths, [OBJECT_BYTES] * AT_ONCE), strict=True):
            if data != expected[index]:
                faults.put(f"read {i} of process {seed}: object {index} is {data[:40]!r}")
                return
        if rng.random() < 0.05:
            cache.drop(paths[:1])


def test_processes_that_share_a_small_folder_read_every_object_whole(tmp_path):
    objects, folder = tmp_path / "objects", tmp_path / "cache"
    objects.mkdir()
    for i in range(NUM_OBJECTS):
        (objects / str(i)).write_bytes(content(i))
    spawn = multiprocessing.get_context("spawn")
    started, faults = spawn.Semaphore(0), spawn.SimpleQueue()
    processes = [
        spawn.Process(target=read_at_random, args=(str(objects), str(folder), i, held, num_reads, started, faults))
        # One process has a smaller bound, so it removes objects that the others are writing.
        for i, (held, num_reads) in enumerate([(HELD_OBJECTS, 600)] * 2 + [(1, 600), (HELD_OBJECTS, 10**6)])
    ]
    for process in processes:
        process.start()
    for _ in processes:
        assert started.acquire(timeout=60)
    most = 0
    time.sleep(0.3)
    processes[3].kill()  # while it reads and writes
    while any(process.is_alive() for process in processes):
        most = max(most, held_bytes(folder))
        time.sleep(0.002)
    assert faults.empty()
    assert [process.exitcode for process in processes] == [0, 0, 0, -9]
    # Each process may have added objects since its last scan.
    assert most <= (HELD_OBJECTS + 4 * AT_ONCE) * OBJECT_BYTES
    cache = ReadThroughCache(fsspec.filesystem("file"), folder, HELD_OBJECTS * OBJECT_BYTES)
    for i in range(NUM_OBJECTS):
        assert cache.read([f"{objects}/{i}"], [OBJECT_BYTES]) == [content(i)]
    assert held_bytes(folder) <= HELD_OBJECTS * OBJECT_BYTES
