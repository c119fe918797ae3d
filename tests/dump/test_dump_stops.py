"""Errors that stop the dump at once: a full disk, a revoked credential, another job on the same store."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest

import logitstore
from logitstore.errors import StorageRefusedError
from logitstore.storage.storage import Storage
from logitstore.store.commits.index import find_commit
from tests.helpers import failing_models
from tests.helpers.dump_jobs import ROOT, arguments, in_process, left_in_staging, payload, private_folders, start_job
from tests.helpers.faults import FaultyProxy, S3Server, s3_options
from tests.helpers.paths import environment
from tests.helpers.tiny import functions, write_jsonl

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The job's main function in this process. Jobs in other processes join its Ray cluster."""
    import ray

    with private_folders(tmp_path_factory.mktemp) as patch, in_process() as main:
        patch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
        yield main


@pytest.fixture(scope="module")
def slow(job, tiny, tmp_path_factory):
    """A target that sleeps at each batch, and an undisturbed store made with it."""
    folder = tmp_path_factory.mktemp("slow") / "target"
    model = failing_models.make(folder, tiny.target)
    data = write_jsonl(folder / "data.jsonl", functions(30))
    models, url = SimpleNamespace(target=str(model)), folder / "undisturbed.zarr"

    def command(store, *more):
        return [*arguments(store, models, data, "--trust_remote_code", "--reference", f"ref={tiny.reference}"), *more]

    job(command(url))
    store = logitstore.open(url)
    counts = collections.Counter(token for shard in store.shards() for token in set(shard.ids.tolist()))
    failing_models.fail(folder, slow=[token for token, _ in counts.most_common(20)])
    return SimpleNamespace(
        command=command, url=url, payload=payload(url), num_shards=store.num_shards, target=str(model)
    )


def one_line(errors):
    """Returns the only error line of a job's stderr."""
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, errors
    assert "Traceback" not in errors
    return lines[0]


def test_revoked_credential_stops_the_job_and_a_rerun_continues(job, slow, tmp_path, capfd, caplog):
    with S3Server() as server, FaultyProxy(server.url) as proxy:
        server.make_bucket("bucket")
        fs = fsspec.filesystem("s3", **s3_options(server.url), use_listings_cache=False)
        (tmp_path / "options.json").write_text(json.dumps(s3_options(proxy.url)))
        command = slow.command("s3://bucket/c.zarr", "--storage_options", str(tmp_path / "options.json"))

        def committed():
            with contextlib.suppress(FileNotFoundError):
                return fs.ls("bucket/c.zarr/commits/losses/ref", detail=False)
            return []

        def revoke():
            while len(committed()) < 2:
                time.sleep(0.02)
            proxy.refuse(403, "AccessDenied")

        revoking = threading.Thread(target=revoke)
        revoking.start()
        with pytest.raises(SystemExit) as ended:
            job(command)
        revoking.join()
        stopped = committed()
        line = one_line(capfd.readouterr().err)
        assert ended.value.code == 1
        assert "permission was denied for s3://bucket/c.zarr at " in line
        assert "PermissionError" in line
        assert 2 <= len(stopped) < slow.num_shards
        proxy.allow()
        summary = job(command)
        assert set(stopped) <= set(committed())
        assert summary["shards_skipped"] >= 2
        assert summary["set_aside"] == {"shards": {}, "documents": {}}
        root = "bucket/c.zarr/"
        found = {path.removeprefix(root): fs.cat_file(path) for path in fs.find(root)}
        assert {path: data for path, data in found.items() if "/c/" in path} == slow.payload
        assert not [path for path in found if path.startswith("staging/")]
        assert logitstore.verify(logitstore.open("s3://bucket/c.zarr", s3_options(server.url))) == []
        assert not any(b"hunter2" in data for data in found.values())
        assert "hunter2" not in caplog.text + "".join(capfd.readouterr()) + line


FULL_DISK = """
import json, shutil, subprocess, sys
from pathlib import Path

folder, size, out, command = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], check=True)
import ray
from logitstore.commands import dump
ray.init(address="local", num_cpus=1, log_to_driver=False, include_dashboard=False)
try:
    dump.run(command)
except SystemExit as ended:
    print("exit status", ended.code, flush=True)
shutil.copytree(Path(folder) / "c.zarr", Path(out) / "full.zarr")
subprocess.run(["mount", "-o", "remount,size=64m", "none", folder], check=True)
dump.run(command)
shutil.copytree(Path(folder) / "c.zarr", Path(out) / "finished.zarr")
"""


def on_disk(folder):
    """Returns the bytes that the files of a folder take on a disk with pages of 4 KiB."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in Path(folder).rglob("*") if path.is_file())


def test_full_disk_stops_the_job_and_a_rerun_continues(slow, tmp_path):
    """The job runs in its own mount namespace with a small disk, which needs no privileges on most systems."""
    alone = ["unshare", "--user", "--map-root-user", "--mount"]
    (tmp_path / "disk").mkdir()
    try:
        probe = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(tmp_path / "disk")]
        subprocess.run([*alone, *probe], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs user namespaces, to mount a small disk: {error}")
    folders = [path for path in slow.url.iterdir() if path.is_dir()]
    tokens = sum(on_disk(path) for path in folders if path.name == "tokens") + on_disk(slow.url / "commits" / "tokens")
    size = tokens + (on_disk(slow.url) - tokens) // 2
    command = slow.command(tmp_path / "disk" / "c.zarr")
    run = subprocess.run(
        [*alone, sys.executable, "-c", FULL_DISK, tmp_path / "disk", str(size), tmp_path, json.dumps(command)],
        env=environment(RAY_ADDRESS="local"), cwd=ROOT,
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "exit status 1" in run.stdout
    line = one_line(run.stderr)
    assert "there is no space left for " in line
    assert "No space left on device" in line
    full = logitstore.open(tmp_path / "full.zarr")
    assert 0 < len(full.layers["target"].missing) < full.num_shards
    assert logitstore.verify(full) == []
    assert payload(tmp_path / "finished.zarr") == slow.payload
    assert left_in_staging(tmp_path / "finished.zarr") == []


def test_full_disk_is_a_refusal_and_not_a_temporary_error(tmp_path):
    """A limit of the file size stands for a full disk."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limit[1]))
    try:
        with pytest.raises(StorageRefusedError, match=r"there is no space left for .*File too large"):
            Storage(tmp_path / "c").put("object", bytes(2**17))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert os.listdir(tmp_path / "c") == []


def ended(*jobs):
    """Waits for jobs. Returns (exit status, stderr) of each."""
    results = [process.communicate(timeout=280) for process in jobs]
    return [(process.returncode, errors) for process, (_, errors) in zip(jobs, results, strict=True)]


def test_two_jobs_on_one_store_both_finish_it(slow, tmp_path):
    url = tmp_path / "c.zarr"
    for status, errors in ended(*(start_job(*slow.command(url)) for _ in range(2))):
        assert status == 0, errors
    store = logitstore.open(url)
    assert payload(url) == slow.payload
    assert logitstore.verify(store) == []
    assert left_in_staging(url) == []


def test_two_jobs_with_different_targets_never_mix_rows_and_one_finishes(slow, tiny, tmp_path):
    url = tmp_path / "c.zarr"
    other = slow.command(url, "--target", tiny.draft)
    runs = ended(start_job(*slow.command(url)), start_job(*other))
    assert sorted(status == 0 for status, _ in runs) == [False, True], runs
    ((loser, (status, errors)),) = [(i, run) for i, run in enumerate(runs) if run[0] != 0]
    assert status in (1, 2)
    assert "target" in one_line(errors)
    store = logitstore.open(url)
    assert store.spec.target.model.name == (slow.target if loser else tiny.draft)
    assert not store.layers["target"].missing
    assert logitstore.verify(store) == []
    makers = {find_commit(store.storage, "target", shard).made_by for shard in range(store.num_shards)}
    assert makers == {store.layers["target"].made_by}
    assert left_in_staging(url) == []
    if loser:
        assert payload(url) == slow.payload
