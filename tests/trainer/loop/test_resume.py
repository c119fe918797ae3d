"""Resuming a run: exactly where it stopped, only the same run, and not beyond its end."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.runs import arguments, refuse_models, same_weights, weights
from tests.helpers.tiny import write_store
from trainer import DraftTrainer
from trainer.commands import train as train_command
from trainer.run import train

RESUME = ["--resume_from_checkpoint", "true"]


@pytest.fixture(scope="module")
def folder(tiny, tiny_store, tmp_path_factory):
    """An adaspec run of 3 epochs with 4 steps each, with a checkpoint in the middle of an epoch."""
    folder = tmp_path_factory.mktemp("run") / "draft"
    extra = ["--selection", "adaspec", "--reference", "reference", "--keep", "0.4", "--save_steps", "6"]
    train_command.run(arguments(tiny, tiny_store, folder, *extra))
    return folder


def test_run_resumed_in_mid_epoch_equals_the_uninterrupted_run(folder, tmp_path):
    shutil.copytree(folder / "checkpoint-6", tmp_path / "out" / "checkpoint-6")
    (tmp_path / "out" / "checkpoint-9").mkdir()  # an unfinished checkpoint
    options = tmp_path / "options.json"
    options.write_text("{}")
    metrics = train_command.run([
        str(folder / "run.yaml"), "--output_dir", str(tmp_path / "out"), "--resume_from_checkpoint", "true",
        "--cache_dir", str(tmp_path / "cache"), "--storage_options", str(options),
    ])  # fmt: skip
    assert metrics["steps"] == 12
    assert same_weights(weights(tmp_path / "out"), weights(folder))


def test_resumed_run_with_random_selection_keeps_the_same_rows(tiny, tiny_store, tmp_path):
    extra = ["--selection", "random", "--max_steps", "5", "--save_steps", "2", "--save_total_limit", "9"]
    train_command.run(arguments(tiny, tiny_store, tmp_path / "whole", *extra))
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    train_command.run(arguments(tiny, tiny_store, tmp_path / "parts", *extra, "--resume_from_checkpoint", checkpoint))
    assert same_weights(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


def contents(folder):
    """Returns content and change time of each file of a folder, including checkpoints."""
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.mark.parametrize(
    "extra",
    [
        ["--max_steps", "3"],  # ends in the middle of an epoch, where Trainer alone would make a fourth step
        ["--num_train_epochs", "1"],
        ["--num_train_epochs", "0.6", "--save_strategy", "no"],
    ],
)
def test_finished_run_started_again_changes_nothing(tiny, tiny_store, tmp_path, capsys, extra):
    argv = arguments(tiny, tiny_store, tmp_path / "out", *extra, *RESUME)
    first = train_command.run(argv)
    before = contents(tmp_path)
    capsys.readouterr()
    again = train_command.run([*argv, "--logging_steps", "1", "--save_total_limit", "1", "--json"])
    assert again == first
    assert contents(tmp_path) == before
    out, err = capsys.readouterr()
    steps = int(first["steps"])
    told = f"{tmp_path / 'out'} holds this run, finished after {steps} steps: nothing is left to train"
    assert told in err.splitlines()
    assert json.loads(out) == {"draft": str(tmp_path / "out")} | first


def test_run_killed_after_its_last_checkpoint_trains_no_further_step(tiny, tiny_store, tmp_path):
    argv = arguments(tiny, tiny_store, tmp_path / "out", "--max_steps", "3", *RESUME)
    first = train_command.run(argv)
    whole = weights(tmp_path / "out")
    for path in (tmp_path / "out").iterdir():
        if path.is_file() and path.name not in ("run.yaml", "config.json"):
            path.unlink()  # as if the run had been killed while it wrote the model
    again = train_command.run(argv)
    assert again["steps"] == first["steps"] == 3
    assert again["loss"] == first["loss"] > 0
    assert same_weights(weights(tmp_path / "out"), whole)
    assert train_command.run(argv) == again


def test_resume_from_a_checkpoint_before_the_last_is_refused(tiny, tiny_store, tmp_path, capsys, monkeypatch):
    """It would start a second branch, and the next resume with `true` would use the last checkpoint of the first."""
    common = ["--save_steps", "2", "--save_total_limit", "9"]
    train_command.run(arguments(tiny, tiny_store, tmp_path / "out", *common, "--max_steps", "6"))
    monkeypatch.chdir(tmp_path)
    argv = arguments(tiny, tiny_store, tmp_path / "out", *common, "--max_steps", "8", "--resume_from_checkpoint")
    with pytest.raises(SystemExit):
        train_command.run([*argv, "out/checkpoint-2/"])
    message = f"last checkpoint of the run, got resume_from_checkpoint={tmp_path}/out/checkpoint-2, but "
    assert f"{message}{tmp_path}/out/checkpoint-6 is later; delete the later checkpoints" in capsys.readouterr().err
    for step in (4, 6):
        shutil.rmtree(tmp_path / "out" / f"checkpoint-{step}")
    assert train_command.run([*argv, "out/checkpoint-2"])["steps"] == 8


def test_finished_run_can_be_extended_from_its_checkpoint(tiny, tiny_store, tmp_path):
    schedule = ["--lr_scheduler_type", "constant"]
    for steps in ("2", "5"):
        extra = [*schedule, "--max_steps", steps, *RESUME]
        metrics = train_command.run(arguments(tiny, tiny_store, tmp_path / "out", *extra))
    assert metrics["steps"] == 5
    assert yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())["max_steps"] == 5
    train_command.run(arguments(tiny, tiny_store, tmp_path / "whole", *schedule, "--max_steps", "5"))
    assert same_weights(weights(tmp_path / "out"), weights(tmp_path / "whole"))
    before = contents(tmp_path / "out")
    extra = [*schedule, "--max_steps", "2", *RESUME]
    assert train_command.run(arguments(tiny, tiny_store, tmp_path / "out", *extra))["steps"] == 5
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--learning_rate", "0.5"], "learning_rate must be 0.01 as in {out}/run.yaml to resume that run, got "),
        (
            ["--keep", "0.5"],
            "keep must be 0.4 as in {out}/run.yaml to resume that run, got keep=0.5; give that value, ",
        ),
        (["--seed", "1"], "seed must be 42 as in {out}/run.yaml to resume that run, got seed=1; give that value, or "),
        (["--store", "elsewhere"], "store must be {store} as in {out}/run.yaml to resume that run, got store="),
    ],
)
def test_resume_with_other_options_is_refused(folder, tiny_store, capsys, monkeypatch, extra, message):
    monkeypatch.setattr("trainer.drafts.source.load_model", refuse_models)
    before = contents(folder)
    for wanted in ("true", str(folder / "checkpoint-6")):
        with pytest.raises(SystemExit) as exit_:
            train_command.run([str(folder / "run.yaml"), *extra, "--resume_from_checkpoint", wanted])
        assert exit_.value.code == 2
        assert capsys.readouterr().err.startswith("error: " + message.format(out=folder, store=tiny_store))
    assert contents(folder) == before


def test_finished_model_without_checkpoints_is_not_overwritten(tiny, tiny_store, tmp_path, capsys, monkeypatch):
    argv = arguments(tiny, tiny_store, tmp_path / "out", "--save_strategy", "no", *RESUME)
    train_command.run([*argv, "--max_steps", "2"])
    monkeypatch.setattr("trainer.drafts.source.load_model", refuse_models)
    before = contents(tmp_path)
    cases = {
        "learning_rate must be 0.01 as in": ["--max_steps", "2", "--learning_rate", "0.5"],
        "has no checkpoint from which it could go on to max_steps=4; give": ["--max_steps", "4"],
        "has no checkpoint from which it could go on to num_train_epochs=2; give": ["--num_train_epochs", "2"],
        "output_dir must hold a run to resume, got": ["--output_dir", tiny.draft],
    }
    for message, extra in cases.items():
        with pytest.raises(SystemExit) as exit_:
            train_command.run([*argv, *extra])
        assert exit_.value.code == 2
        assert message in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_run_yaml_is_never_partial_and_always_matches_the_model(tiny, tiny_store, tmp_path, monkeypatch):
    argv = arguments(tiny, tiny_store, tmp_path / "out", *RESUME)
    train_command.run([*argv, "--max_steps", "2"])
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}

    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(DraftTrainer, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        train_command.run([*argv, "--max_steps", "4"])
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    monkeypatch.undo()
    monkeypatch.setattr(train, "write_state", stopped)
    with pytest.raises(KeyboardInterrupt):
        train_command.run([*argv, "--max_steps", "4"])
    assert not (tmp_path / "out" / "trainer_state.json").exists()  # this file marks the model as that of run.yaml
    monkeypatch.undo()
    assert train_command.run([*argv, "--max_steps", "4"])["steps"] == 4
    monkeypatch.setattr(DraftTrainer, "train", stopped)
    monkeypatch.setattr(Path, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        train_command.run(arguments(tiny, tiny_store, tmp_path / "new"))
    assert not (tmp_path / "new" / "run.yaml").exists()


def test_resume_with_other_documents_is_refused(tiny, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(tiny.tokenizer)
    target = AutoModelForCausalLM.from_pretrained(tiny.target).eval()
    store = str(tmp_path / "cache.zarr")
    argv = arguments(tiny, store, tmp_path / "out", "--save_steps", "2", *RESUME)
    for first in (3, 4):
        shutil.rmtree(store, ignore_errors=True)
        documents = [([i, *range(first, 40)], [1] * (40 - first) + [0]) for i in range(20)]
        write_store(store, documents, target, tokenizer)
        if first == 3:
            train_command.run([*argv, "--max_steps", "2"])
    before = contents(tmp_path / "out")
    with pytest.raises(SystemExit) as exit_:
        train_command.run([*argv, "--max_steps", "4"])
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert "order of documents must be the same as in the run to resume, got 20 packs per epoch here and 20 in " in err
    assert "/checkpoint-2: the documents or their order are different; read the same unchanged stores" in err
    assert contents(tmp_path / "out") == before
