"""Output to a URL gives the same draft as output to a folder, also after kills, damage and refused requests."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import fsspec
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.faults import FaultyProxy, S3Server
from tests.helpers.paths import HELPERS, JOBS
from tests.helpers.tiny import VOCAB_SIZE
from tests.helpers.training import with_dropout
from trainer.commands import train as train_command
from trainer.loop.remote_checkpoints import Remote
from trainer.run.output import local_folder

SECRETS = {"key": "AKIAdistinctive1key", "secret": "distinctive2/secret+x", "token": "distinctive3token"}
RESUME = ["--resume_from_checkpoint", "true"]
MANY = 40
"""Steps of a long run."""
MODEL = {"config.json", "model.safetensors", "tokenizer.json", "run.yaml", "README.md", "trainer_state.json"}


@pytest.fixture(scope="module")
def draft(tiny, tmp_path_factory):
    return with_dropout(tmp_path_factory.mktemp("draft") / "draft", tiny.draft)


@pytest.fixture(scope="module")
def proxy():
    with S3Server() as server, FaultyProxy(server.url) as proxy:
        server.make_bucket("runs")
        yield proxy


@pytest.fixture(scope="module")
def options(proxy, tmp_path_factory):
    """Path of the file with the options of the bucket."""
    file = tmp_path_factory.mktemp("secret") / "options.json"
    file.write_text(json.dumps(SECRETS | {"endpoint_url": proxy.url}))
    return str(file)


@pytest.fixture
def fs(proxy):
    proxy.allow()
    found = fsspec.filesystem("s3", **SECRETS, endpoint_url=proxy.url, use_listings_cache=False)
    found.invalidate_cache()
    return found


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """A temporary folder for files that a run uploads to its URL."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "machine"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    (tmp_path / "machine").mkdir()
    return tmp_path / "machine"


@pytest.fixture
def arguments(draft, tiny_store, options, request):
    """Function that returns the arguments of a run. The default output is a URL for this test only."""

    own = f"s3://runs/deep/{request.node.name.partition('[')[0]}"

    def make(*extra, output=own, steps=6):
        return [
            "--store", tiny_store, "--draft", draft, "--output_dir", str(output), "--storage_options", options,
            "--selection", "adaspec", "--reference", "reference", "--learning_rate", "0.01", "--save_steps", "2",
            "--lr_scheduler_type", "constant", "--per_device_train_batch_size", "6", "--logging_steps", "1",
            "--max_steps", str(steps), "--no_progress", "true", "--use_cpu", "true", *extra,
        ]  # fmt: skip

    return make


@pytest.fixture(scope="module")
def whole(draft, tiny_store, options, tmp_path_factory):
    """Weights of the same run in a folder: the model after six steps, and the checkpoints of a run of MANY steps."""
    folder = tmp_path_factory.mktemp("whole")
    argv = [
        "--store", tiny_store, "--draft", draft, "--storage_options", options,
        "--selection", "adaspec", "--reference", "reference", "--learning_rate", "0.01", "--save_steps", "2",
        "--lr_scheduler_type", "constant", "--per_device_train_batch_size", "6",
        "--no_progress", "true", "--use_cpu", "true", "--save_total_limit", str(MANY),
    ]  # fmt: skip
    train_command.run([*argv, "--output_dir", str(folder / "six"), "--max_steps", "6"])
    train_command.run([*argv, "--output_dir", str(folder / "many"), "--max_steps", str(MANY)])
    return {path.parent.name: load_file(path) for path in folder.rglob("model.safetensors")}


def url_of(argv):
    return argv[argv.index("--output_dir") + 1]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def fetched(fs, url, folder):
    fs.get(url, str(folder), recursive=True)
    return load_file(folder / "model.safetensors")


def checkpoints_at(fs, url):
    return sorted(path.rpartition("/")[2] for path in fs.ls(url, detail=False) if "/checkpoint-" in path)


def refused(argv, capsys):
    """Runs arguments that are refused. Returns the exit status and the error line."""
    with pytest.raises(SystemExit) as exit_:
        train_command.run(argv)
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return exit_.value.code, err


def test_run_to_a_url_writes_the_same_files_as_to_a_folder(arguments, fs, whole, machine, tmp_path, capsys):
    argv = arguments()
    url = url_of(argv)
    train_command.run([*argv, "--json"])
    printed = capsys.readouterr()
    assert json.loads(printed.out.splitlines()[-1])["draft"] == url
    assert same(fetched(fs, url, tmp_path / "got"), whole["six"])
    assert {path.name for path in (tmp_path / "got").iterdir()} >= MODEL
    AutoModelForCausalLM.from_pretrained(tmp_path / "got")
    AutoTokenizer.from_pretrained(tmp_path / "got")
    assert checkpoints_at(fs, url) == ["checkpoint-4", "checkpoint-6"]  # save_total_limit is 2
    assert same(load_file(tmp_path / "got" / "checkpoint-4" / "model.safetensors"), whole["checkpoint-4"])
    assert not [path for path in machine.rglob("*") if path.is_file()]
    values = yaml.safe_load((tmp_path / "got" / "run.yaml").read_text())
    assert values["output_dir"] == url
    assert url in (tmp_path / "got" / "README.md").read_text()
    everything = [path.read_bytes() for path in (tmp_path / "got").rglob("*") if path.is_file()]
    everything += [printed.out.encode(), printed.err.encode()]
    assert not [1 for content in everything for secret in SECRETS.values() if secret.encode() in content]


def test_finished_run_at_a_url_is_unchanged_and_another_run_is_refused(arguments, fs, whole, tmp_path, capsys):
    argv = arguments(steps=2)
    url = url_of(argv)
    first = train_command.run(argv)
    before = fs.find(url, detail=True)
    capsys.readouterr()
    status, line = refused(argv, capsys)
    assert status == 2
    assert f"output_dir must be new or empty, got output_dir={url}, which holds a run" in line
    status, line = refused([*argv, *RESUME, "--keep", "0.5"], capsys)
    assert (status, f"keep must be 0.4 as in {url}/run.yaml to resume that run" in line) == (2, True)
    assert train_command.run([*argv, *RESUME]) == first
    assert f"{url} holds this run, finished after 2 steps: nothing is left to train" in capsys.readouterr().out
    assert fs.find(url, detail=True) == before
    train_command.run([*arguments(steps=6), *RESUME])  # the run is extended
    assert same(fetched(fs, url, tmp_path / "got"), whole["six"])
    assert yaml.safe_load((tmp_path / "got" / "run.yaml").read_text())["max_steps"] == 6


def test_dry_run_writes_nothing(arguments, fs, machine):
    argv = arguments("--dry_run", "true")
    train_command.run(argv)
    assert not fs.exists(url_of(argv))
    assert not list(machine.iterdir())


def test_killed_run_resumes_from_the_url_to_the_same_weights(arguments, fs, whole, machine, tmp_path):
    """It resumes from the last complete checkpoint, because the test deletes a file of the newest one."""
    argv = arguments(steps=1000)
    url = url_of(argv)
    remote = Remote(url, fs.storage_options)
    job = subprocess.Popen([sys.executable, str(JOBS / "train_draft.py"), *argv], stderr=subprocess.DEVNULL)
    while job.poll() is None and len(remote.finished()) < 2:
        time.sleep(0.05)
    job.kill()
    assert job.wait() == -signal.SIGKILL
    assert [path for path in machine.rglob("*") if path.is_file()]
    # The run resumes on another machine: the killed job may have left a later checkpoint here that was not uploaded.
    shutil.rmtree(machine)
    machine.mkdir()
    before, last = remote.finished()
    fs.rm_file(f"{url}/{last}/optimizer.pt")
    assert remote.finished() == [before]
    steps = int(last.removeprefix("checkpoint-"))
    assert 4 <= steps <= MANY
    train_command.run([*arguments(steps=steps), *RESUME])
    fetched(fs, url, tmp_path / "got")
    assert same(load_file(tmp_path / "got" / last / "model.safetensors"), whole[last])
    assert checkpoints_at(fs, url) == sorted([before, last])


def test_damaged_remote_checkpoint_is_skipped_for_the_one_before(arguments, fs, whole, tmp_path, caplog):
    argv = arguments(steps=4)
    url = url_of(argv)
    train_command.run([*argv, "--save_total_limit", "9"])
    fs.rm_file(f"{url}/config.json")  # as if the run had been killed before its end
    content = fs.cat_file(f"{url}/checkpoint-4/scheduler.pt")
    fs.pipe_file(f"{url}/checkpoint-4/scheduler.pt", content[:-1] + b"x")
    train_command.run([*arguments(steps=6), "--save_total_limit", "9", *RESUME])
    assert f"checkpoint {url}/checkpoint-4 is damaged: scheduler.pt does not match checkpoint.json" in caplog.text
    assert same(fetched(fs, url, tmp_path / "got"), whole["six"])
    history = json.loads((tmp_path / "got" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3, 4, 5, 6]


def test_best_checkpoint_is_found_on_another_machine(arguments, fs, tmp_path, monkeypatch):
    best = ["--eval_fraction", "0.2", "--eval_strategy", "steps", "--eval_steps", "2", "--load_best_model_at_end",
            "true", "--save_total_limit", "1", "--learning_rate", "3"]  # fmt: skip
    argv = arguments(*best)
    url = url_of(argv)
    train_command.run(argv)
    state = json.loads(fs.cat_file(f"{url}/trainer_state.json"))
    assert Path(state["best_model_checkpoint"]).name == "checkpoint-2"
    assert checkpoints_at(fs, url) == ["checkpoint-2", "checkpoint-6"]
    (tmp_path / "other machine").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "other machine"))
    train_command.run([*arguments(*best, steps=8), *RESUME])
    final = fetched(fs, url, tmp_path / "got")
    best = load_file(tmp_path / "got" / "checkpoint-2" / "model.safetensors")
    assert all(torch.equal(final[name][:VOCAB_SIZE], value[:VOCAB_SIZE]) for name, value in best.items())
    assert checkpoints_at(fs, url) == ["checkpoint-2", "checkpoint-8"]


@pytest.mark.parametrize("wanted", ["true", "{kept}/checkpoint-4"])
def test_files_that_cannot_be_uploaded_are_kept(wanted, arguments, fs, proxy, whole, tmp_path, capsys, monkeypatch):
    url = f"{url_of(arguments())}/{len(wanted)}"
    argv = arguments(output=url)
    upload = Remote.upload

    def full(self, folder):
        if folder.name == "checkpoint-4":
            proxy.refuse(403, "QuotaExceeded")
        upload(self, folder)

    monkeypatch.setattr(Remote, "upload", full)
    status, line = refused(argv, capsys)
    assert status == 1
    assert f"url must be readable and writable, got url={url} (PermissionError: " in line
    kept = local_folder(url)
    assert f"the trained files are kept in {kept} on " in line
    assert line.endswith(f"; resume with --resume_from_checkpoint {kept}/checkpoint-4\n")
    assert not [secret for secret in SECRETS.values() if secret in line]
    proxy.allow()
    monkeypatch.undo()
    monkeypatch.setattr(tempfile, "tempdir", str(kept.parents[2]))
    assert checkpoints_at(fs, url) == ["checkpoint-2"]
    status, line = refused([*argv, "--resume_from_checkpoint", f"{url}/checkpoint-2"], capsys)
    assert status == 2
    assert f"must be the last checkpoint of the run, got resume_from_checkpoint={url}/checkpoint-2, but " in line
    train_command.run([*argv, "--resume_from_checkpoint", wanted.format(kept=kept)])
    line = f"resumes after step 4, from {kept}/checkpoint-4, which was not copied to {url}\n"
    assert line in capsys.readouterr().out
    assert same(fetched(fs, url, tmp_path / "got"), whole["six"])
    assert not kept.exists()


def no_training(*args, **kwargs):
    raise AssertionError("training began before the bucket was asked")


def test_unwritable_bucket_is_reported_before_training(arguments, proxy, capsys, monkeypatch):
    monkeypatch.setattr("trainer.loop.draft_trainer.DraftTrainer.train", no_training)
    status, line = refused(arguments(output="s3://nowhere/run"), capsys)
    message = "got url=s3://nowhere/run (FileNotFoundError"
    assert (status, message in line, "kept in" in line) == (1, True, False)
    proxy.refuse()
    status, line = refused(arguments(), capsys)
    assert (status, "permission was denied for s3://" in line) == (2, True)
    proxy.allow()


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("memory://run", "output_dir must be a folder or a URL that outlasts the run, got output_dir=memory://run; "),
        ("s3://", "output_dir must name a folder in the bucket, got output_dir=s3://; add"),
        ("nothing://a/b", "url must have a protocol that fsspec knows, got url=nothing://a/b; give a folder, s3://"),
    ],
)
def test_unsuitable_output_dir_is_refused(output, message, arguments, capsys):
    status, line = refused(arguments(output=output), capsys)
    assert status == 2
    assert message in line


def test_file_url_is_treated_as_a_folder(arguments, whole, machine, tmp_path, capsys):
    train_command.run([*arguments(output=f"file://{tmp_path}/out"), "--json"])
    assert same(load_file(tmp_path / "out" / "model.safetensors"), whole["six"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["draft"] == f"{tmp_path}/out"
    assert not list(machine.iterdir())


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_machines_with_separate_folders_resume_to_the_same_weights(arguments, fs, tmp_path):
    """Two processes stand for two machines. Every checkpoint has the files of both."""
    small, script = ["--per_device_train_batch_size", "3"], HELPERS / "many_runs.py"
    whole, again = "s3://runs/machines/whole", "s3://runs/machines/again"
    runs = [
        arguments(*small, output=whole),
        arguments(*small, output=again, steps=2),
        arguments(*small, *RESUME, output=again),
    ]
    port, jobs = free_port(), []
    for rank in range(2):
        (tmp_path / f"machine {rank}").mkdir()
        environment = {
            "RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port, "TMPDIR": tmp_path / f"machine {rank}", "OMP_NUM_THREADS": 1,
        }  # fmt: skip
        environment = os.environ | {name: str(value) for name, value in environment.items()}
        with (tmp_path / f"{rank}.txt").open("w") as log:
            command = [sys.executable, script, json.dumps(runs)]
            jobs.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    assert [job.wait(timeout=200) for job in jobs] == [0, 0], (tmp_path / "0.txt").read_text()[-4000:]
    names = {path.rpartition("/")[2] for path in fs.find(f"{whole}/checkpoint-4")}
    assert {"rng_state_0.pth", "rng_state_1.pth", "steps_0.pth", "steps_1.pth"} < names
    one, two = (fetched(fs, url, tmp_path / f"got {number}") for number, url in enumerate((whole, again)))
    assert same(one, two)
    assert not [path for rank in range(2) for path in (tmp_path / f"machine {rank}").rglob("*") if path.is_file()]
