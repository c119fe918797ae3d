"""Training on Ray workers: as torchrun trains, through deaths of workers, and as a job that is submitted."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time

import fsspec
import psutil
import pytest
import torch
import train_draft
from faults import S3Server, s3_options
from head_node import ROOT, head_node
from safetensors.torch import load_file
from training import with_dropout

from trainer import checkpoints
from trainer.checkpoints import Remote

WORKERS = ["--num_workers", "2"]
MANY = 60
"""Steps of a run that is long enough to be killed in the middle."""


@pytest.fixture(scope="module")
def draft(tiny, tmp_path_factory):
    return with_dropout(tmp_path_factory.mktemp("draft") / "draft", tiny.draft)


@pytest.fixture(scope="module")
def cluster():
    with head_node(num_cpus=2) as node:
        yield node


@pytest.fixture(scope="module")
def arguments(draft, tiny_store):
    def make(output, *extra, steps=MANY):
        return [
            "--store", tiny_store, "--draft", draft, "--output_dir", str(output), "--selection", "adaspec",
            "--reference", "reference", "--learning_rate", "0.01", "--per_device_train_batch_size", "3",
            "--lr_scheduler_type", "constant", "--save_steps", "2", "--max_steps", str(steps), "--use_cpu", "true",
            *extra,
        ]  # fmt: skip

    return make


@pytest.fixture(scope="module")
def by_torchrun(arguments, tmp_path_factory):
    """The weights of two ranks without Ray, by checkpoint; and of the model after four steps."""
    folder = tmp_path_factory.mktemp("torchrun")
    quiet = ["--disable_tqdm", "true", "--save_total_limit", str(MANY)]
    runs = [arguments(folder / "many", *quiet), arguments(folder / "four", *quiet, steps=4)]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        str(ROOT / "tests" / "many_runs.py"), json.dumps(runs),
    ]  # fmt: skip
    subprocess.run(command, check=True, timeout=200, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
    return {path.parent.name: load_file(path) for path in folder.rglob("model.safetensors")}


def start(cluster, argv, **environment):
    """Starts the job by hand, on the cluster."""
    command = [sys.executable, train_draft.__file__, *argv]
    environment = cluster.environment | {"RAY_ADDRESS": cluster.address} | environment
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)


def finish(job):
    """Waits for a job; returns its exit status and what it printed."""
    out, err = job.communicate(timeout=200)
    return job.returncode, out, err


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def workers_of(cluster):
    """The processes that train."""
    found = []
    for process in cluster.process.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def test_a_submitted_job_trains_as_torchrun_does(cluster, arguments, by_torchrun, tmp_path):
    job = cluster.submit("python", "jobs/train_draft.py", *arguments(tmp_path / "out", *WORKERS, steps=4))
    assert job.returncode == 0, job.stdout + job.stderr
    assert same(load_file(tmp_path / "out" / "model.safetensors"), by_torchrun["four"])
    (line,) = [line for line in job.stdout.splitlines() if line.startswith("{")]
    found = json.loads(line)
    assert (found["draft"], found["steps"]) == (str(tmp_path / "out"), 4.0)
    assert "Traceback" not in job.stdout
    assert [path.name for path in checkpoints.finished(tmp_path / "out")] == ["checkpoint-2", "checkpoint-4"]


def test_a_worker_that_dies_costs_the_steps_since_the_last_checkpoint(cluster, arguments, by_torchrun, tmp_path):
    """At a URL, from which each machine fetches it."""
    with S3Server() as server:
        server.make_bucket("runs")
        options = s3_options(server.url)
        url, fs = "s3://runs/out", fsspec.filesystem("s3", **options, use_listings_cache=False)
        remote = Remote(url, options)
        (tmp_path / "machine").mkdir()
        job = start(
            cluster, arguments(url, *WORKERS), LOGITSTORE_STORAGE_OPTIONS=json.dumps(options),
            TMPDIR=str(tmp_path / "machine"),
        )  # fmt: skip
        while job.poll() is None and len(remote.finished()) < 2:
            time.sleep(0.05)
        first = workers_of(cluster)
        assert len(first) == 2, finish(job)
        first[1].kill()
        status, out, err = finish(job)
        assert status == 0, out + err
        assert "note: worker " in err
        assert f"; going on from {url}/checkpoint-" in err
        assert options["secret"] not in out + err
        fs.get(f"{url}/checkpoint-{MANY}", str(tmp_path / "last"), recursive=True)
        assert same(load_file(tmp_path / "last" / "model.safetensors"), by_torchrun[f"checkpoint-{MANY}"])
        assert json.loads(out.splitlines()[-1])["steps"] == MANY


def test_mistakes_are_one_line_whoever_finds_them(cluster, arguments, tmp_path, capsys, monkeypatch):
    # only with as many ranks as there will be is a step longer than an epoch
    argv = arguments(tmp_path / "out", *WORKERS, "--dataloader_drop_last", "true")
    argv[argv.index("--per_device_train_batch_size") + 1] = "20"
    status, out, err = finish(start(cluster, argv))
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (status, out, len(lines)) == (2, "", 1)
    assert lines[0].startswith("error: dataloader_drop_last must be False where an epoch has fewer packs than a step")
    assert "Traceback" not in err

    def no_ray(*args, **kwargs):
        raise AssertionError("Ray was asked for before the arguments were checked")

    monkeypatch.setattr("ray.init", no_ray)
    for extra, environment, message in (
        (["--store", str(tmp_path / "none")], {}, "url must be that of a store, got url="),
        (["--draft", str(tmp_path / "none")], {}, "draft must be a Hugging Face id or a folder with a config.json"),
        (["--reference", "other"], {}, "reference must be one of ['reference']"),
        (["--num_workers", "0"], {}, "num_workers must be at least 1, got num_workers=0"),
        ([], {"WORLD_SIZE": "1"}, "num_workers must be left out where torchrun starts the processes, got num_workers"),
    ):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as exit_:
            train_draft.main([*arguments(tmp_path / "other", *WORKERS), *extra])
        assert exit_.value.code == 2
        assert message in (err := capsys.readouterr().err)
        assert err.count("\n") == 1
    assert not (tmp_path / "other").exists()


def test_ray_that_is_not_there_is_one_line(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray.train", None)
    with pytest.raises(SystemExit) as exit_:
        train_draft.main(arguments(tmp_path / "out", *WORKERS))
    assert exit_.value.code == 2
    assert "num_workers must be left out where Ray Train cannot be loaded, got num_workers=2 (" in (
        err := capsys.readouterr().err
    )
    assert "pip install 'ray[default,train]'" in err


def test_a_dry_run_counts_the_workers_and_needs_none(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    train_draft.main(arguments(tmp_path / "out", *WORKERS, "--dry_run", "true"))
    assert f"steps      {MANY} of 6 packs (3 x 2 ranks x 1 micro-batches)" in capsys.readouterr().out
