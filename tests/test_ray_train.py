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
from _output import open_output
from _ray_train import run_until_done
from faults import S3Server, s3_options
from head_node import head_node
from safetensors.torch import load_file
from training import with_dropout

from trainer.loop import checkpoints
from trainer.loop.remote_checkpoints import Remote

WORKERS = ["--num_workers", "2"]
MANY = 40
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
    """The weights of two ranks without Ray."""
    folder = tmp_path_factory.mktemp("torchrun")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        train_draft.__file__, *arguments(folder / "out", "--disable_tqdm", "true", "--save_strategy", "no"),
    ]  # fmt: skip
    subprocess.run(command, check=True, timeout=200, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
    return load_file(folder / "out" / "model.safetensors")


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


def but_rays_own(text):
    """Lines but those of a helper of Ray's, which looks for its Ray and fails where a machine has several."""
    return "".join(line for line in text.splitlines(keepends=True) if "PlacementGroupCleaner" not in line)


def test_a_submitted_job_trains_as_torchrun_does_though_a_worker_dies(cluster, arguments, by_torchrun, tmp_path):
    """It goes on from the last checkpoint, which is at a URL: each machine fetches it."""
    with S3Server() as server:
        server.make_bucket("runs")
        options = s3_options(server.url)
        (tmp_path / "options.json").write_text(json.dumps(options))
        url, fs = "s3://runs/out", fsspec.filesystem("s3", **options, use_listings_cache=False)
        remote = Remote(url, options)
        argv = arguments(url, *WORKERS, "--storage_options", str(tmp_path / "options.json"))
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
def test_mistakes_are_one_line_whoever_finds_them(cluster, arguments, tmp_path, capsys, monkeypatch):
    # only with as many ranks as there will be is a step longer than an epoch
    argv = arguments(tmp_path / "out", *WORKERS, "--dataloader_drop_last", "true")
    argv[argv.index("--per_device_train_batch_size") + 1] = "20"
    found = subprocess.run(
        [sys.executable, train_draft.__file__, *argv], env=cluster.environment | {"RAY_ADDRESS": cluster.address},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    (line,) = [line for line in found.stderr.splitlines() if line.startswith("error: ")]
    assert (found.returncode, found.stdout) == (2, "")
    assert line.startswith("error: dataloader_drop_last must be False where an epoch has fewer packs than a step")
    assert "Traceback" not in but_rays_own(found.stderr)

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
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
    assert not (tmp_path / "other").exists()


def test_workers_that_die_again_and_again_end_the_job(tmp_path, capsys):
    output, begun = open_output(str(tmp_path), None), []

    def run(start):
        begun.append(start and start.rpartition("/")[2])
        for step in {2: (2,), 4: (3, 5)}.get(len(begun), ()):
            (tmp_path / f"checkpoint-{step}").mkdir()
            checkpoints.write_record(tmp_path / f"checkpoint-{step}")
        return f"worker {len(begun)} died"

    with pytest.raises(SystemExit) as exit_:
        run_until_done(run, output, None)
    assert exit_.value.code == 1
    assert begun == [None, None, "checkpoint-2", "checkpoint-2", "checkpoint-5", "checkpoint-5", "checkpoint-5"]
    assert capsys.readouterr().err.splitlines() == [
        "note: worker 1 died; going on from the beginning",
        *(f"note: worker {number} died; going on from {tmp_path}/checkpoint-2" for number in (2, 3)),
        *(f"note: worker {number} died; going on from {tmp_path}/checkpoint-5" for number in (4, 5, 6)),
        f"error: workers must live, got 3 deaths since {tmp_path}/checkpoint-5: worker 7 died",
    ]


def test_ray_that_is_not_there_is_one_line(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray.train", None)
    with pytest.raises(SystemExit) as exit_:
        train_draft.main(arguments(tmp_path / "out", *WORKERS))
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert "num_workers must be left out where Ray Train cannot be loaded, got num_workers=2 (" in err
    assert err.endswith("; pip install 'ray[default]>=2.60' pandas pyarrow\n")


def test_a_dry_run_counts_the_workers_and_needs_none(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    train_draft.main(arguments(tmp_path / "out", *WORKERS, "--dry_run", "true"))
    assert f"steps      {MANY} of 6 packs (3 x 2 ranks x 1 micro-batches)" in capsys.readouterr().out
