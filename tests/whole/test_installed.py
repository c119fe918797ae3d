"""The installed package: a wheel in a fresh virtual environment runs the whole pipeline in an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import pytest

from tests.helpers.paths import ROOT

EXTRAS = "dump,train"
TORCH = "torch==2.13.0"
FEW = ["--num_proc", "1", "--num_actors", "1", "--cpus_per_actor", "1", "--no_progress"]
TRAINING = ["--max_steps", "4", "--per_device_train_batch_size", "4", "--use_cpu", "true", "--save_strategy", "no"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, timeout=120)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Runs the installed command in an empty folder; the environment says nothing about the checkout."""
    folder = tmp_path_factory.mktemp("fresh")
    venv, empty = folder / "venv", folder / "empty"
    empty.mkdir()
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True, timeout=120)
    pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    pip += ["--constraint", str(ROOT / "constraints.txt")]
    for what in (["--upgrade", "pip"], [TORCH], [f"{wheel}[{EXTRAS}]"]):
        subprocess.run([*pip, *what], check=True, timeout=600)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"RAY_ADDRESS": "local", "HF_DATASETS_CACHE": str(folder / "datasets")}

    def run(*arguments):
        return subprocess.run(
            [str(venv / "bin" / "logitstore"), *map(str, arguments)], cwd=empty, env=environment, capture_output=True,
            text=True, check=False, timeout=240,
        )  # fmt: skip

    return SimpleNamespace(run=run, folder=empty, environment=environment, python=venv / "bin" / "python")


def test_wheel_holds_both_packages_with_their_types_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"logitstore", "trainer"}
    assert {"logitstore/py.typed", "trainer/py.typed"} <= set(names)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_whole_pipeline_runs_from_the_wheel_in_an_empty_folder(installed, tiny):
    def run(*arguments):
        done = installed.run(*arguments)
        assert done.returncode == 0, (arguments, done.stdout, done.stderr[-3000:])
        assert "jobs/" not in done.stdout
        return done.stdout

    assert "dump " in run("--help")
    out = run("dump", "--store", "c.zarr", "--target", tiny.target, "--data", tiny.data, "--max_length", "256", *FEW)
    assert "next: logitstore fidelity c.zarr\n      logitstore train --store c.zarr" in out
    assert "target: complete" in run("info", "c.zarr")
    assert "all are as committed" in run("verify", "c.zarr")
    assert "verdict: " in run("fidelity", "c.zarr")
    out = run("train", "--store", "c.zarr", "--draft", tiny.draft, "--output_dir", "reference", *TRAINING)
    assert "next: logitstore evaluate --store c.zarr --draft reference" in out
    run("dump", "--store", "c.zarr", "--reference", "ref=reference", *FEW)
    run("train", "--store", "c.zarr", "--draft", tiny.draft, "--output_dir", "draft", *TRAINING,
        "--selection", "adaspec", "--reference", "ref")  # fmt: skip
    out = run("evaluate", "--store", "c.zarr", "--draft", "draft", "--target", tiny.target, "--data", tiny.data,
              "--num_prompts", "2", "--max_new_tokens", "4", "--no_progress")  # fmt: skip
    assert "alpha (cache), sampled" in out
    run("export", "c.zarr", "--shard", "0", "--out", "shard.npz")
    assert installed.run("export", "c.zarr", "--shard", "0", "--out", "shard.npz").returncode == 2
    run("plan", "--data", tiny.data, "--target", tiny.target, "--max_length", "256")
    where = "import logitstore, trainer; print(logitstore.__file__, trainer.__file__)"
    found = subprocess.run(
        [installed.python, "-c", where], cwd=installed.folder, env=installed.environment, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert str(ROOT) not in found.stdout
