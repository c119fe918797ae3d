"""Runs of the dump job on small stores: its command line, as a process or in this one, and what it wrote."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
JOB = str(ROOT / "jobs" / "dump_logits.py")


def arguments(store, tiny, data, *more):
    """Of a job that makes a store of shards of some 1,000 rows with one actor."""
    return ["--store", str(store), "--target", tiny.target, "--data", data, "--max_length", "256",
            "--shard_rows", "1024", "--k", "12", "--num_proc", "1", "--num_actors", "1",
            "--cpus_per_actor", "1", "--batch_tokens", "256", *more]  # fmt: skip


def start_job(*args, **changes):
    return subprocess.Popen(
        [sys.executable, JOB, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        **changes,
    )  # fmt: skip


@contextlib.contextmanager
def in_process(num_cpus=2):
    """The job's main in this process, on a Ray of its own."""
    import dump_logits
    import ray

    ray.init(address="local", num_cpus=num_cpus, log_to_driver=False, include_dashboard=False)
    try:
        yield dump_logits.main
    finally:
        ray.shutdown()


@contextlib.contextmanager
def private_folders(make):
    """Nothing is looked up or left in the home folder; each job that is a process starts a Ray of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(make("datasets")))
        patch.setenv("HF_MODULES_CACHE", str(make("modules")))
        patch.setenv("RAY_ADDRESS", "local")
        patch.setenv("TQDM_DISABLE", "1")
        yield patch


def payload(url):
    """Every byte of every array."""
    return {str(path.relative_to(url)): path.read_bytes() for path in sorted(Path(url).rglob("c/*"))}


def records(url, layer):
    """The commit records of a layer, by shard."""
    return {int(path.name.split("-")[0]): path for path in sorted(Path(url, "commits", layer).glob("*.json"))}


def left_in_staging(url):
    return [path for path in Path(url, "staging").rglob("*") if path.is_file()]
