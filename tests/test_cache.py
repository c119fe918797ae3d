"""The local cache of a bucket's objects: a real S3 server over HTTP, real processes, real full disks."""

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
from faults import S3Server, s3_options

from logitstore.storage.cache import ReadThroughCache, fetch


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
    """A folder in the place of a bucket, where the kind of bucket does not matter: five objects of 100 bytes."""
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
    """The names of the objects of `local` that a cache holds."""
    return "".join(sorted(path.read_text()[0] for path in cache.folder.iterdir()))


def held_bytes(folder):
    total = 0
    for path in folder.iterdir() if folder.exists() else ():
        with contextlib.suppress(FileNotFoundError):  # evicted by another process just now
            total += path.stat().st_size
    return total


def test_what_was_read_once_is_read_without_the_bucket(bucket, tmp_path):
    objects = {f"bucket/s/{name}": os.urandom(1000) for name in "abc"}
    bucket.pipe(objects)
    cache = ReadThroughCache(bucket, tmp_path / "cache", 10_000)
    assert read(cache, *objects) == list(objects.values())
    bucket.rm(list(objects))
    assert read(cache, *objects) == list(objects.values())
    assert isinstance(fetch(bucket, ["bucket/s/a"], [1000])[0], FileNotFoundError)
    # So does another process that was sent the cache, or has its own on the same folder.
    assert read(pickle.loads(pickle.dumps(cache)), *objects) == list(objects.values())
    assert read(ReadThroughCache(bucket, tmp_path / "cache", 10_000), "bucket/s/b") == [objects["bucket/s/b"]]


def test_a_missing_object_fails_alone_and_is_looked_for_again(bucket, tmp_path):
    bucket.pipe({"bucket/a": b"a", "bucket/c": b"c"})
    cache = ReadThroughCache(bucket, tmp_path / "cache", 10_000)
    a, b, c, nowhere = read(cache, "bucket/a", "bucket/b", "bucket/c", "nobucket/a")
    assert (a, c) == (b"a", b"c")
    assert isinstance(b, FileNotFoundError)
    assert isinstance(nowhere, FileNotFoundError)
    bucket.pipe("bucket/b", b"b")
    assert read(cache, "bucket/b", "bucket/a") == [b"b", b"a"]


def test_an_object_beyond_its_limit_is_cut_and_not_kept(bucket, tmp_path):
    bucket.pipe("bucket/a", b"a" * 1000)
    cache = ReadThroughCache(bucket, tmp_path / "cache", 10_000)
    assert read(cache, "bucket/a", limit=999) == [b"a" * 1000]
    assert read(cache, "bucket/a", limit=10) == [b"a" * 11]
    assert held_bytes(tmp_path / "cache") == 0
    assert read(cache, "bucket/a", limit=1000) == [b"a" * 1000]
    assert held_bytes(tmp_path / "cache") == 1000
    assert read(cache, "bucket/a", limit=10) == [b"a" * 11]  # from the folder no more, either


def test_an_empty_object_is_read_as_no_bytes(bucket, tmp_path):
    bucket.pipe({"bucket/empty": b"no more", "bucket/full": b"f"})
    bucket.ls("bucket")  # remembered by the file system
    fsspec.filesystem("s3", **bucket.storage_options, skip_instance_cache=True).pipe("bucket/empty", b"")
    cache = ReadThroughCache(bucket, tmp_path / "cache", 10_000)
    assert read(cache, "bucket/empty", "bucket/full") == [b"", b"f"]
    bucket.rm("bucket/empty")
    assert read(cache, "bucket/empty") == [b""]


def test_an_empty_object_is_read_as_no_bytes_from_a_driver_that_gives_the_status(bucket, server):
    for name, data in {"empty": b"", "full": b"full"}.items():
        bucket.pipe_file(f"bucket/{name}", data, ACL="public-read")
    urls = [f"{server['endpoint_url']}/bucket/{name}" for name in ("empty", "full")]
    assert fetch(fsspec.filesystem("http"), urls, [2, 2]) == [b"", b"ful"]


def test_two_services_with_one_name_of_a_bucket_do_not_mix(bucket, server, tmp_path):
    bucket.pipe("bucket/a", b"a")
    elsewhere = server["endpoint_url"].replace("127.0.0.1", "localhost")
    named_inside = {"key": "k", "secret": "s", "client_kwargs": {"endpoint_url": elsewhere}}
    for fs in (bucket, fsspec.filesystem("s3", **server | {"endpoint_url": elsewhere}), bucket):
        assert read(ReadThroughCache(fs, tmp_path, 10_000), "bucket/a") == [b"a"]
    assert len(list(tmp_path.iterdir())) == 2
    fs = fsspec.filesystem("s3", **named_inside)
    assert read(ReadThroughCache(fs, tmp_path, 10_000), "bucket/a") == [b"a"]


def test_two_protocols_with_one_path_do_not_mix(local, tmp_path):
    read(local_cache(tmp_path, 1000), local / "a")
    memory = fsspec.filesystem("memory")
    memory.pipe(str(local / "a"), b"memory")
    assert read(ReadThroughCache(memory, tmp_path / "cache", 1000), local / "a") == [b"memory"]
    memory.rm(str(local / "a"))


def test_the_folder_stays_within_its_bound(local, tmp_path):
    cache = local_cache(tmp_path, 250)
    for name in "abcdeabcde":
        assert read(cache, local / name) == [name.encode() * 100]
        assert held_bytes(cache.folder) <= 250
    assert held_bytes(cache.folder) == 200
    assert [data[:1] for data in read(cache, *(local / name for name in "abcde"))] == [b"a", b"b", b"c", b"d", b"e"]
    assert held_bytes(cache.folder) == 200


def test_what_was_used_before_makes_room_the_oldest_first(local, tmp_path):
    before = local_cache(tmp_path, 300)
    for name in "abca":
        read(before, local / name)
    cache = local_cache(tmp_path, 300)
    read(cache, local / "d")  # in the place of b
    assert held(cache) == "acd"
    read(cache, local / "c")  # used again, so that it stays
    read(cache, local / "e")
    assert held(cache) == "cde"


def test_what_was_used_since_stays_and_nothing_more_is_added(local, tmp_path, caplog):
    before = local_cache(tmp_path, 300)
    read(before, local / "a")
    cache = local_cache(tmp_path, 300)
    for name in "bcdea":
        with caplog.at_level(logging.DEBUG, "logitstore"):
            assert read(cache, local / name) == [name.encode() * 100]
    assert held(cache) == "bcd"
    assert [(record.levelno, record.message.partition(" full ")[2]) for record in caplog.records] == [
        (logging.DEBUG, "of what was used since: nothing more is added")
    ]
    # To the one that was opened first, all is new; to one that is opened now, nothing.
    assert read(before, local / "e") == [b"e" * 100]
    assert held(cache) == "bcd"
    read(local_cache(tmp_path, 300), local / "e")
    assert held(cache) == "cde"


def test_copies_for_other_processes_keep_what_the_run_has_used(local, tmp_path):
    cache = local_cache(tmp_path, 300)
    read(cache, *(local / name for name in "abc"))
    worker = pickle.loads(pickle.dumps(cache))
    read(worker, local / "d", local / "e")
    assert held(cache) == "abc"


def test_of_a_shuffled_store_as_much_is_hit_as_fits(tmp_path):
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


def test_an_object_beyond_the_bound_is_read_and_evicts_nothing(local, tmp_path):
    (local / "huge").write_bytes(b"h" * 400)
    cache = local_cache(tmp_path, 300)
    read(cache, *(local / name for name in "abc"))
    assert read(cache, local / "huge") == [b"h" * 400]
    assert held_bytes(cache.folder) == 300


def test_a_large_folder_is_looked_at_now_and_then(local, tmp_path, monkeypatch):
    monkeypatch.setattr("logitstore.storage.cache.FILES_PER_LOOK", 100)
    folder = tmp_path / "cache"
    folder.mkdir()
    for i in range(250):
        (folder / f"{i:064x}").write_bytes(b"1")
        os.utime(folder / f"{i:064x}", (i, i))
    cache = local_cache(tmp_path, 350)
    read(cache, local / "a")  # the first look: 250 + 100 bytes
    read(cache, local / "b")
    read(cache, local / "c")
    assert held_bytes(folder) == 550  # two new files are not yet a hundredth
    read(cache, local / "d")
    assert held_bytes(folder) == 300  # 250 old ones are not enough for the last three: one goes too
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


def test_files_that_are_not_the_caches_are_left_alone(local, tmp_path):
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


def test_what_killed_writers_left_counts_and_goes(local, tmp_path):
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


def test_a_folder_that_cannot_be_written_is_told_once_and_reads_go_on(local, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    cache = local_cache(tmp_path, 1000, "file/cache")
    for name in "abab":
        assert read(cache, local / name) == [name.encode() * 100]
    cache.drop([str(local / "a")])
    assert read(cache, local / "a") == [b"a" * 100]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "cache folder must be one that can be written and has space, got folder=" in record.message
    assert "Not a directory" in record.message


def test_on_a_full_disk_what_is_there_is_still_used(local, tmp_path, caplog):
    (local / "large").write_bytes(b"l" * 5000)
    cache = local_cache(tmp_path, 100_000)
    read(cache, local / "a")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # a write beyond fails half done, as on a full disk
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


def test_the_folder_is_the_same_from_everywhere(tmp_path, monkeypatch):
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
    """What one process does: reads and sometimes drops objects, and reports the first that is not as it was written."""
    rng = random.Random(seed)
    logging.getLogger("logitstore").addHandler(logging.StreamHandler(SimpleNamespace(write=faults.put)))
    expected = [content(i) for i in range(NUM_OBJECTS)]
    started.release()
    for i in range(num_reads):
        if i % READS_OF_A_RUN == 0:  # to the next run, what the others are adding is old
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
        # One has a smaller bound, and so removes what the others are writing.
        for i, (held, num_reads) in enumerate([(HELD_OBJECTS, 600)] * 2 + [(1, 600), (HELD_OBJECTS, 10**6)])
    ]
    for process in processes:
        process.start()
    for _ in processes:
        assert started.acquire(timeout=60)
    most = 0
    time.sleep(0.3)
    processes[3].kill()  # in the middle of something
    while any(process.is_alive() for process in processes):
        most = max(most, held_bytes(folder))
        time.sleep(0.002)
    assert faults.empty()
    assert [process.exitcode for process in processes] == [0, 0, 0, -9]
    # What each process has added and not yet looked for.
    assert most <= (HELD_OBJECTS + 4 * AT_ONCE) * OBJECT_BYTES
    cache = ReadThroughCache(fsspec.filesystem("file"), folder, HELD_OBJECTS * OBJECT_BYTES)
    for i in range(NUM_OBJECTS):
        assert cache.read([f"{objects}/{i}"], [OBJECT_BYTES]) == [content(i)]
    assert held_bytes(folder) <= HELD_OBJECTS * OBJECT_BYTES
