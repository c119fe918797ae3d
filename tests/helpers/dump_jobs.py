"""Runs the dump job on small stores, in a process of its own or in this one, and reads the files that it wrote."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

JOB = str(ROOT / "jobs" / "dump_logits.py")


def arguments(store, tiny, data, *more):
    """Returns the command line of a job with one actor that writes shards of about 1,000 rows."""
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
    """Provides the job's main function in this process, with a Ray cluster of its own."""
    import ray

    from logitstore.commands import dump as dump_command

    ray.init(address="local", num_cpus=num_cpus, log_to_driver=False, include_dashboard=False)
    try:
        yield dump_command.run
    finally:
        ray.shutdown()


@contextlib.contextmanager
def private_folders(make):
    """Keeps jobs out of the home folder, and makes each job that is a process start its own Ray cluster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(make("datasets")))
        patch.setenv("HF_MODULES_CACHE", str(make("modules")))
        patch.setenv("RAY_ADDRESS", "local")
        patch.setenv("TQDM_DISABLE", "1")
        yield patch


def payload(url):
    """Returns the bytes of every object of every array, by path."""
    return {str(path.relative_to(url)): path.read_bytes() for path in sorted(Path(url).rglob("c/*"))}


def records(url, layer):
    """Returns the paths of the commit records of a layer, by shard."""
    return {int(path.name.split("-")[0]): path for path in sorted(Path(url, "commits", layer).glob("*.json"))}


def left_in_staging(url):
    return [path for path in Path(url, "staging").rglob("*") if path.is_file()]
