"""Going on with a run: exactly where it stopped, with no other run, and not beyond its end."""

import json
import shutil
from pathlib import Path

import pytest
import train_draft
import yaml
from conftest import write_store
from test_trainer import arguments, refuse_models, same_weights, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer import DraftTrainer

RESUME = ["--resume_from_checkpoint", "true"]


@pytest.fixture(scope="module")
def folder(tiny, tiny_store, tmp_path_factory):
    """One adaspec run of 3 epochs of 4 steps, with a checkpoint in mid-epoch."""
    folder = tmp_path_factory.mktemp("run") / "draft"
    extra = ["--selection", "adaspec", "--reference", "reference", "--keep", "0.4", "--save_steps", "6"]
    train_draft.main(arguments(tiny, tiny_store, folder, *extra))
    return folder


def test_a_run_resumed_in_mid_epoch_equals_one_never_stopped(folder, tmp_path):
    shutil.copytree(folder / "checkpoint-6", tmp_path / "out" / "checkpoint-6")
    (tmp_path / "out" / "checkpoint-9").mkdir()  # a checkpoint that was not finished
    options = tmp_path / "options.json"
    options.write_text("{}")
    metrics = train_draft.main([
        str(folder / "run.yaml"), "--output_dir", str(tmp_path / "out"), "--resume_from_checkpoint", "true",
        "--cache_dir", str(tmp_path / "cache"), "--storage_options", str(options),
    ])  # fmt: skip
    assert metrics["steps"] == 12
    assert same_weights(weights(tmp_path / "out"), weights(folder))


def test_a_resumed_run_of_random_rows_keeps_the_same_ones(tiny, tiny_store, tmp_path):
    extra = ["--selection", "random", "--max_steps", "5", "--save_steps", "2", "--save_total_limit", "9"]
    train_draft.main(arguments(tiny, tiny_store, tmp_path / "whole", *extra))
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    train_draft.main(arguments(tiny, tiny_store, tmp_path / "parts", *extra, "--resume_from_checkpoint", checkpoint))
    assert same_weights(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


def contents(folder):
    """Bytes and change time of each file of a folder, checkpoints and all."""
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.mark.parametrize(
    "extra",
    [
        ["--max_steps", "3"],  # in mid-epoch, where Trainer would make a fourth
        ["--num_train_epochs", "1"],
        ["--num_train_epochs", "0.6", "--save_strategy", "no"],
    ],
)
def test_a_finished_run_started_again_changes_nothing(tiny, tiny_store, tmp_path, capsys, extra):
    argv = arguments(tiny, tiny_store, tmp_path / "out", *extra, *RESUME)
    first = train_draft.main(argv)
    before = contents(tmp_path)
    capsys.readouterr()
    again = train_draft.main([*argv, "--logging_steps", "1", "--save_total_limit", "1"])
    assert again == first
    assert contents(tmp_path) == before
    told, figures = capsys.readouterr().out.splitlines()
    steps = int(first["steps"])
    assert told == f"{tmp_path / 'out'} holds this run, finished after {steps} steps: nothing is left to train"
    assert json.loads(figures) == {"draft": str(tmp_path / "out")} | first


def test_a_run_killed_after_its_last_checkpoint_trains_no_further_step(tiny, tiny_store, tmp_path):
    argv = arguments(tiny, tiny_store, tmp_path / "out", "--max_steps", "3", *RESUME)
    first = train_draft.main(argv)
    whole = weights(tmp_path / "out")
    for path in (tmp_path / "out").iterdir():
        if path.is_file() and path.name not in ("run.yaml", "config.json"):
            path.unlink()  # the model was being written
    again = train_draft.main(argv)
    assert again["steps"] == first["steps"] == 3
    assert again["loss"] == first["loss"] > 0
    assert same_weights(weights(tmp_path / "out"), whole)
    assert train_draft.main(argv) == again


def test_a_run_does_not_go_on_before_its_last_checkpoint(tiny, tiny_store, tmp_path, capsys, monkeypatch):
    """It would be another branch, and the next `true` would take the last checkpoint of the first."""
    common = ["--save_steps", "2", "--save_total_limit", "9"]
    train_draft.main(arguments(tiny, tiny_store, tmp_path / "out", *common, "--max_steps", "6"))
    monkeypatch.chdir(tmp_path)
    argv = arguments(tiny, tiny_store, tmp_path / "out", *common, "--max_steps", "8", "--resume_from_checkpoint")
    with pytest.raises(SystemExit):
        train_draft.main([*argv, "out/checkpoint-2/"])
    message = f"last checkpoint of the run, got resume_from_checkpoint={tmp_path}/out/checkpoint-2, and there is "
    assert f"{message}{tmp_path}/out/checkpoint-6; delete the later ones" in capsys.readouterr().err
    for step in (4, 6):
        shutil.rmtree(tmp_path / "out" / f"checkpoint-{step}")
    assert train_draft.main([*argv, "out/checkpoint-2"])["steps"] == 8


def test_a_finished_run_is_prolonged_from_its_checkpoint(tiny, tiny_store, tmp_path):
    schedule = ["--lr_scheduler_type", "constant"]
    for steps in ("2", "5"):
        extra = [*schedule, "--max_steps", steps, *RESUME]
        metrics = train_draft.main(arguments(tiny, tiny_store, tmp_path / "out", *extra))
    assert metrics["steps"] == 5
    assert yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())["max_steps"] == 5
    train_draft.main(arguments(tiny, tiny_store, tmp_path / "whole", *schedule, "--max_steps", "5"))
    assert same_weights(weights(tmp_path / "out"), weights(tmp_path / "whole"))
    before = contents(tmp_path / "out")
    extra = [*schedule, "--max_steps", "2", *RESUME]
    assert train_draft.main(arguments(tiny, tiny_store, tmp_path / "out", *extra))["steps"] == 5
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--learning_rate", "0.5"], "learning_rate must be 0.01 as in {out}/run.yaml to go on with that run, got "),
        (["--keep", "0.5"], "keep must be 0.4 as in {out}/run.yaml to go on with that run, got keep=0.5; give that, "),
        (["--seed", "1"], "seed must be 42 as in {out}/run.yaml to go on with that run, got seed=1; give that, or "),
        (["--store", "elsewhere"], "store must be {store} as in {out}/run.yaml to go on with that run, got store="),
    ],
)
def test_another_run_does_not_go_on_with_a_runs_checkpoints(folder, tiny_store, capsys, monkeypatch, extra, message):
    monkeypatch.setattr("trainer.drafts.source.load_weights", refuse_models)
    before = contents(folder)
    for wanted in ("true", str(folder / "checkpoint-6")):
        with pytest.raises(SystemExit) as exit_:
            train_draft.main([str(folder / "run.yaml"), *extra, "--resume_from_checkpoint", wanted])
        assert exit_.value.code == 2
        assert capsys.readouterr().err.startswith("error: " + message.format(out=folder, store=tiny_store))
    assert contents(folder) == before


def test_a_finished_model_without_checkpoints_is_not_overwritten(tiny, tiny_store, tmp_path, capsys, monkeypatch):
    argv = arguments(tiny, tiny_store, tmp_path / "out", "--save_strategy", "no", *RESUME)
    train_draft.main([*argv, "--max_steps", "2"])
    monkeypatch.setattr("trainer.drafts.source.load_weights", refuse_models)
    before = contents(tmp_path)
    cases = {
        "learning_rate must be 0.01 as in": ["--max_steps", "2", "--learning_rate", "0.5"],
        "max_steps must be what the finished run in": ["--max_steps", "4"],
        "num_train_epochs must be what the finished run in": ["--num_train_epochs", "2"],
        "output_dir must hold a run to go on with, got": ["--output_dir", tiny.draft],
    }
    for message, extra in cases.items():
        with pytest.raises(SystemExit) as exit_:
            train_draft.main([*argv, *extra])
        assert exit_.value.code == 2
        assert message in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_run_yaml_is_never_half_written_nor_of_another_run_than_the_model(tiny, tiny_store, tmp_path, monkeypatch):
    argv = arguments(tiny, tiny_store, tmp_path / "out", *RESUME)
    train_draft.main([*argv, "--max_steps", "2"])
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}

    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(DraftTrainer, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        train_draft.main([*argv, "--max_steps", "4"])
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    monkeypatch.undo()
    monkeypatch.setattr(train_draft, "write_state", stopped)
    with pytest.raises(KeyboardInterrupt):
        train_draft.main([*argv, "--max_steps", "4"])
    assert not (tmp_path / "out" / "trainer_state.json").exists()  # what says that the model is that of run.yaml
    monkeypatch.undo()
    assert train_draft.main([*argv, "--max_steps", "4"])["steps"] == 4
    monkeypatch.setattr(DraftTrainer, "train", stopped)
    monkeypatch.setattr(Path, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        train_draft.main(arguments(tiny, tiny_store, tmp_path / "new"))
    assert not (tmp_path / "new" / "run.yaml").exists()


def test_a_run_of_other_documents_does_not_go_on(tiny, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(tiny.tokenizer)
    target = AutoModelForCausalLM.from_pretrained(tiny.target).eval()
    store = str(tmp_path / "cache.zarr")
    argv = arguments(tiny, store, tmp_path / "out", "--save_steps", "2", *RESUME)
    for first in (3, 4):
        shutil.rmtree(store, ignore_errors=True)
        documents = [([i, *range(first, 40)], [1] * (40 - first) + [0]) for i in range(20)]
        write_store(store, documents, target, tokenizer)
        if first == 3:
            train_draft.main([*argv, "--max_steps", "2"])
    before = contents(tmp_path / "out")
    with pytest.raises(SystemExit) as exit_:
        train_draft.main([*argv, "--max_steps", "4"])
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert "order of documents must be as in the run to go on with, got 20 packs in an epoch, and 20 of other" in err
    assert contents(tmp_path / "out") == before
