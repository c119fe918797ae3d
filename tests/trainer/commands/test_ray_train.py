"""Training on Ray workers: the same result as with torchrun, also when workers die, and as a submitted job."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time

import fsspec
import psutil
import pytest
import torch
from safetensors.torch import load_file

from logitstore.cluster.train_workers import WorkersDiedError, run_until_done
from tests.helpers.faults import S3Server, s3_options
from tests.helpers.head_node import head_node
from tests.helpers.paths import JOBS
from tests.helpers.training import with_dropout
from trainer.commands import train as train_command
from trainer.loop import checkpoints
from trainer.loop.remote_checkpoints import Remote
from trainer.run.output import open_output
from trainer.run.run_folder import find_checkpoint

WORKERS = ["--num_workers", "2"]
MANY = 40
"""Steps of a run that is long enough for a worker to be killed in the middle."""


@pytest.fixture(scope="module")
def draft(tiny, tmp_path_factory):
    return with_dropout(tmp_path_factory.mktemp("draft") / "draft", tiny.draft)


@pytest.fixture(scope="module")
def cluster():
    with head_node(num_cpus=2) as node:
        yield node


@pytest.fixture(scope="module")
def arguments(draft, tiny_store):
    def make(output, *extra):
        return [
            "--store", tiny_store, "--draft", draft, "--output_dir", str(output), "--selection", "adaspec",
            "--reference", "reference", "--learning_rate", "0.01", "--per_device_train_batch_size", "3",
            "--lr_scheduler_type", "constant", "--save_steps", "2", "--max_steps", str(MANY), "--use_cpu", "true",
            *extra,
        ]  # fmt: skip

    return make


@pytest.fixture(scope="module")
def by_torchrun(arguments, tmp_path_factory):
    """Weights from a run of two ranks without Ray."""
    folder = tmp_path_factory.mktemp("torchrun")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        str(JOBS / "train_draft.py"), *arguments(folder / "out", "--no_progress", "true", "--save_strategy", "no"),
    ]  # fmt: skip
    subprocess.run(command, check=True, timeout=200, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
    return load_file(folder / "out" / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def workers_of(cluster):
    """Returns the processes that train."""
    found = []
    for process in cluster.process.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def but_rays_own(text):
    """Returns the text without the lines of a Ray helper that fails on machines with several Ray clusters."""
    return "".join(line for line in text.splitlines(keepends=True) if "PlacementGroupCleaner" not in line)


@pytest.mark.long
def test_submitted_job_gives_the_weights_of_torchrun_although_a_worker_dies(cluster, arguments, by_torchrun, tmp_path):
    """The workers resume from the last checkpoint, which each machine fetches from a URL."""
    with S3Server() as server:
        server.make_bucket("runs")
        options = s3_options(server.url)
        (tmp_path / "options.json").write_text(json.dumps(options))
        url, fs = "s3://runs/out", fsspec.filesystem("s3", **options, use_listings_cache=False)
        remote = Remote(url, options)
        argv = arguments(url, *WORKERS, "--storage_options", str(tmp_path / "options.json"), "--json")
        job = cluster.begin("python", "jobs/train_draft.py", *argv)
        while job.poll() is None and len(remote.finished()) < 2:
            time.sleep(0.05)
        workers = workers_of(cluster)
        assert len(workers) == 2, job.communicate()
        workers[1].kill()
        out, err = job.communicate(timeout=200)
        assert job.returncode == 0, out + err
        fs.get(url, str(tmp_path / "out"), recursive=True)
    assert same(load_file(tmp_path / "out" / "model.safetensors"), by_torchrun)
    left = [path.name for path in checkpoints.finished(tmp_path / "out")]
    assert left == [f"checkpoint-{MANY - 2}", f"checkpoint-{MANY}"]
    assert f"; going on from {url}/checkpoint-" in out
    (line,) = [line for line in out.splitlines() if line.startswith("{")]
    found = json.loads(line)
    assert (found["draft"], found["steps"]) == (url, MANY)
    assert options["secret"] not in out + err


@pytest.mark.long
def test_invalid_input_is_one_line_from_the_driver_or_a_worker(cluster, arguments, tmp_path, capsys, monkeypatch):
    # Only the workers find this error: a step is longer than an epoch only with two ranks.
    argv = arguments(tmp_path / "out", *WORKERS, "--dataloader_drop_last", "true")
    argv[argv.index("--per_device_train_batch_size") + 1] = "20"
    found = subprocess.run(
        [sys.executable, str(JOBS / "train_draft.py"), *argv],
        env=cluster.environment | {"RAY_ADDRESS": cluster.address},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    (line,) = [line for line in found.stderr.splitlines() if line.startswith("error: ")]
    assert (found.returncode, found.stdout) == (2, "")
    assert line.startswith("error: dataloader_drop_last must be False if an epoch has fewer packs than a step")
    assert "Traceback" not in but_rays_own(found.stderr)

    def no_ray(*args, **kwargs):
        raise AssertionError("Ray was asked for before the arguments were checked")

    monkeypatch.setattr("ray.init", no_ray)
    for extra, environment, message in (
        (["--store", str(tmp_path / "none")], {}, "url must lead to a store, got url="),
        (["--draft", str(tmp_path / "none")], {}, "draft must be a Hugging Face id or a folder with a config.json"),
        (["--reference", "other"], {}, "reference must be one of ['reference']"),
        (["--num_workers", "0"], {}, "num_workers must be at least 1, got num_workers=0"),
        ([], {"WORLD_SIZE": "1"}, "num_workers must be omitted under torchrun, got num_workers"),
    ):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as exit_:
            train_command.run([*arguments(tmp_path / "other", *WORKERS), *extra])
        assert exit_.value.code == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
    assert not (tmp_path / "other").exists()


def test_repeated_deaths_of_workers_end_the_job(tmp_path):
    output, begun, notes = open_output(str(tmp_path), None), [], []

    def last_checkpoint():
        with output.look() as held:
            return find_checkpoint(held, "true")

    def run(start):
        begun.append(start and start.rpartition("/")[2])
        for step in {2: (2,), 4: (3, 5)}.get(len(begun), ()):
            (tmp_path / f"checkpoint-{step}").mkdir()
            checkpoints.write_record(tmp_path / f"checkpoint-{step}")
        return f"worker {len(begun)} died"

    since = f"since {tmp_path}/checkpoint-5: worker 7 died"
    with pytest.raises(WorkersDiedError, match=re.escape(since)):
        run_until_done(run, last_checkpoint, None, notes.append)
    assert begun == [None, None, "checkpoint-2", "checkpoint-2", "checkpoint-5", "checkpoint-5", "checkpoint-5"]
    assert notes == [
        "worker 1 died; going on from the beginning",
        *(f"worker {number} died; going on from {tmp_path}/checkpoint-2" for number in (2, 3)),
        *(f"worker {number} died; going on from {tmp_path}/checkpoint-5" for number in (4, 5, 6)),
    ]


def test_missing_ray_train_is_reported_with_one_line(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray.train", None)
    with pytest.raises(SystemExit) as exit_:
        train_command.run(arguments(tmp_path / "out", *WORKERS))
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert "num_workers needs Ray Train, got num_workers=2 without it (" in err
    assert err.endswith("; pip install 'logitstore[train-ray]'\n")


def test_dry_run_counts_the_workers_without_starting_ray(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    train_command.run(arguments(tmp_path / "out", *WORKERS, "--dry_run", "true"))
    assert f"steps      {MANY} of 6 packs (3 x 2 ranks x 1 micro-batches)" in capsys.readouterr().out
