"""The trainer as a whole: it learns, saves ordinary models, repeats runs exactly, and refuses invalid input."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import is_torch_bf16_gpu_available, logging

import logitstore
from logitstore.models.identity import tokenizer_spec
from logitstore.storage.storage import Storage
from logitstore.store.commits import set_aside
from tests.helpers.paths import JOBS
from tests.helpers.runs import QUIET, arguments, refuse_models, same_weights, weights
from tests.helpers.tiny import PADDED_VOCAB_SIZE, VOCAB_SIZE, make_model, make_tokenizer, write_store
from trainer.commands import train as train_command


def logged(output_dir, name):
    history = json.loads(Path(output_dir, "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in history if name in entry]


@pytest.fixture(scope="module")
def run(tiny, tiny_store, tmp_path_factory):
    """An adaspec run of 3 epochs with 4 steps each, with a checkpoint in the middle of an epoch."""
    folder = tmp_path_factory.mktemp("run") / "draft"
    extra = ["--selection", "adaspec", "--reference", "reference", "--keep", "0.4", "--save_steps", "6"]
    metrics = train_command.run(arguments(tiny, tiny_store, folder, *extra))
    return SimpleNamespace(folder=folder, metrics=metrics)


def test_ordinary_distillation_lowers_the_divergence(tiny, tiny_store, tmp_path):
    extra = ["--num_train_epochs", "8", "--learning_rate", "0.05"]
    metrics = train_command.run(arguments(tiny, tiny_store, tmp_path / "draft", *extra))
    kl = logged(tmp_path / "draft", "kl")
    assert kl[-1] < 0.8 * kl[0]
    assert metrics["steps"] == 32
    assert metrics["rows_per_second"] > 0
    assert set(logged(tmp_path / "draft", "kept_fraction")) == {1.0}


def test_adaspec_logs_the_kept_fraction_and_threshold(run, tiny_store):
    store = logitstore.open(tiny_store)
    rows = sum(int(store[i].loss_mask.sum()) for i in range(len(store)))
    fraction = logged(run.folder, "kept_fraction")
    assert all(abs(kept - 0.4) < 0.01 for kept in fraction)
    assert len(logged(run.folder, "score_threshold")) == len(fraction) == len(logged(run.folder, "label_nll"))
    assert run.metrics["rows_per_second"] * run.metrics["train_runtime"] == pytest.approx(3 * rows, rel=0.01)
    assert logged(run.folder, "kl")[-1] < logged(run.folder, "kl")[0]


@pytest.fixture(scope="module")
def two_losses(tiny, tmp_path_factory):
    """A store of 6 documents with the losses of the reference and of the untrained draft."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.tokenizer)
    target, reference, draft = (
        AutoModelForCausalLM.from_pretrained(path).eval() for path in (tiny.target, tiny.reference, tiny.draft)
    )
    ids = torch.randint(VOCAB_SIZE, (6, 40), generator=torch.Generator().manual_seed(1)).tolist()
    documents = [(each, [1] * 39 + [0]) for each in ids]
    url = str(tmp_path_factory.mktemp("losses") / "cache.zarr")
    return write_store(url, documents, target, tokenizer, losses={"reference": reference, "first": draft})


def test_each_gap_selection_uses_the_named_losses(two_losses, tiny, tmp_path):
    """All rows are in one batch, so the mean score of the first step is the mean over the store."""
    names = {"adaspec": [], "bottom_gap": [], "static_gap": ["--initial", "first"]}
    found = {}
    for name, more in names.items():
        extra = ["--selection", name, "--reference", "reference", *more, "--max_steps", "1"]
        train_command.run(arguments(tiny, two_losses, tmp_path / name, *extra))
        found[name] = [logged(tmp_path / name, each)[0] for each in ("score_mean", "score_kept", "kept_fraction")]
    store = logitstore.open(two_losses)
    gaps = [store.loss("first")[i] - store.loss("reference")[i] for i in range(6)]
    gap = np.concatenate(gaps)[np.concatenate([store[i].loss_mask for i in range(6)])].astype(float)
    assert abs(gap.mean()) > 1e-3
    for name, sign in {"adaspec": 1, "bottom_gap": -1, "static_gap": 1}.items():
        scores = np.sort(sign * gap)
        kept = scores[scores >= np.quantile(scores, 0.6)]
        expected = [scores.mean(), kept.mean(), len(kept) / len(scores)]
        assert found[name] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_output_is_an_ordinary_model_with_the_stores_tokenizer(run, tiny, tiny_store):
    for folder in (run.folder, run.folder / "checkpoint-6"):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        assert model.config.vocab_size == PADDED_VOCAB_SIZE
        fingerprint = tokenizer_spec(tokenizer, uses_chat_template=False).fingerprint
        assert fingerprint == logitstore.open(tiny_store).spec.tokenizer.fingerprint
    assert not same_weights(weights(run.folder), weights(tiny.draft))


def test_output_works_as_assistant_model_without_changing_the_targets_text(run, tiny):
    target, draft = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (tiny.target, run.folder))
    prompt = torch.tensor([[5, 40, 77, 9]])
    draft.generation_config.num_assistant_tokens = 4
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    assisted = target.generate(prompt, assistant_model=draft, **options)
    assert torch.equal(assisted, target.generate(prompt, **options))


def test_leftover_sampling_settings_are_not_saved(tiny, tiny_store, tmp_path):
    shutil.copytree(tiny.draft, tmp_path / "chatty")
    old = GenerationConfig(
        bos_token_id=0, eos_token_id=[1, 2], repetition_penalty=1.3, do_sample=True, temperature=0.6, top_k=20
    )
    old.save_pretrained(tmp_path / "chatty")
    extra = ["--draft", str(tmp_path / "chatty"), "--max_steps", "1"]
    train_command.run(arguments(tiny, tiny_store, tmp_path / "out", *extra))
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [1, 2]
    assert not {"repetition_penalty", "do_sample", "temperature", "top_k"} & set(saved)
    assert "use_cache" not in saved or saved["use_cache"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["use_cache"] is True


def test_run_yaml_repeats_the_run(run, tmp_path):
    metrics = train_command.run([str(run.folder / "run.yaml"), "--output_dir", str(tmp_path / "again")])
    assert metrics["loss"] == run.metrics["loss"]
    assert same_weights(weights(tmp_path / "again"), weights(run.folder))
    first, second = (yaml.safe_load(Path(f, "run.yaml").read_text()) for f in (run.folder, tmp_path / "again"))
    assert first | {"output_dir": None} == second | {"output_dir": None}


def test_run_yaml_keeps_values_that_equal_transformers_defaults(tiny, tiny_store, tmp_path):
    extra = ["--logging_steps", "500", "--logging_first_step", "false", "--max_steps", "2"]
    train_command.run(arguments(tiny, tiny_store, tmp_path / "out", *extra))
    train_command.run([str(tmp_path / "out" / "run.yaml"), "--output_dir", str(tmp_path / "again")])
    for name in ("out", "again"):
        values = yaml.safe_load((tmp_path / name / "run.yaml").read_text())
        assert (values["logging_steps"], values["logging_first_step"]) == (500, False)
        assert len(logged(tmp_path / name, "kl")) == 1  # only the last step is logged
        assert (values["seed"], values["learning_rate"], values["optim"]) == (42, 0.01, "adamw_torch_fused")


def test_bf16_works_on_a_cpu(tiny, tiny_store, tmp_path):
    extra = ["--bf16", "true", "--max_steps", "1"]
    assert train_command.run(arguments(tiny, tiny_store, tmp_path / "out", *extra))["loss"] > 0


def test_no_progress_hides_all_bars_and_logged_rates_are_integers(tiny, tiny_store, tmp_path, capfd):
    assert logging.is_progress_bar_enabled()
    for quiet in ("true", "false"):
        extra = ["--max_steps", "2", "--no_progress", quiet]
        train_command.run(arguments(tiny, tiny_store, tmp_path / quiet, *extra))
        err = capfd.readouterr().err
        assert ("Loading weights" in err, "Writing model shards" in err) == (quiet == "false", quiet == "false")
        assert logging.is_progress_bar_enabled()
        assert all(type(rate) is int for rate in logged(tmp_path / quiet, "rows_per_second"))
        assert type(logged(tmp_path / quiet, "train_rows_per_second")[-1]) is int


def test_importing_the_trainer_loads_no_ray():
    script = "import sys, trainer; print([m for m in ('ray', 'logitstore.dump') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.fixture(scope="module")
def misfits(tiny, tiny_store, tmp_path_factory):
    """Folder of stores, drafts and run files that are incomplete, damaged or incompatible."""
    folder = tmp_path_factory.mktemp("misfits")
    for name in ("no_target", "unfinished", "unscored"):
        shutil.copytree(tiny_store, folder / name)
    shutil.rmtree(folder / "no_target" / "target")
    next((folder / "unfinished/commits/target").glob("000001-*")).unlink()
    next((folder / "unscored/commits/losses/reference").glob("000000-*")).unlink()
    set_aside.record(Storage(folder / "unscored"), "losses/reference", 0, "out of memory", 3)
    other = make_tokenizer(folder / "other_tokenizer", vocab_size=400)
    make_model(folder / "other_draft", other)
    make_model(folder / "narrow_draft", tiny.tokenizer, vocab_size=VOCAB_SIZE - 8)
    shutil.copytree(tiny.draft, folder / "no_weights")
    (folder / "no_weights" / "model.safetensors").unlink()
    shutil.copytree(tiny.draft, folder / "torn_weights")
    with (folder / "torn_weights" / "model.safetensors").open("r+b") as file:
        file.truncate(2000)
    shutil.copytree(tiny.draft, folder / "short_draft")
    config = json.loads((folder / "short_draft" / "config.json").read_text())
    (folder / "short_draft" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 256}))
    (folder / "foreign").mkdir()
    (folder / "foreign" / "README.md").write_text("not a model card")
    (folder / "taken").mkdir()
    (folder / "taken" / "config.json").write_text("{}")
    (folder / "stopped" / "checkpoint-5").mkdir(parents=True)
    (folder / "typo.yaml").write_text("keeep: 0.4\n")
    (folder / "list.yaml").write_text("- keep\n")
    (folder / "broken.yaml").write_text("keep: [\n")
    (folder / "word.yaml").write_text("keep: some\n")
    return folder


BAD = {
    "no store": (["--store", "{f}/none"], "url must lead to a store, got url={f}/none"),
    "no --store": (["--store", ""], "store must be given, got none; add --store"),
    "no target layer": (
        ["--store", "{f}/no_target"],
        "objective must be label_nll where the store has no target rows, got objective=forward_kl",
    ),
    "unfinished target": (
        ["--store", "{f}/unfinished"],
        "layer 'target' must have all of its 3 shards, got 2 in {f}/unfinished (the first missing shard is 1)",
    ),
    "unfinished losses": (
        ["--store", "{f}/unscored", "--selection", "adaspec", "--reference", "reference"],
        "run the dump again to finish it; shard 0 was set aside: out of memory",
    ),
    "other tokenizer": (["--draft", "{f}/other_draft"], "draft must have the tokenizer of "),
    "narrow vocabulary": (["--draft", "{f}/narrow_draft"], "draft must have a vocabulary of at least 512"),
    "no draft": (["--draft", "{f}/none"], "draft must be a Hugging Face id or a folder with a config.json"),
    "no weights": (["--draft", "{f}/no_weights"], "draft must have weights, got draft={f}/no_weights"),
    "torn weights": (
        ["--draft", "{f}/torn_weights"],
        "draft must have weights that can be read, got draft={f}/torn_weights (",
    ),
    "short context": (["--draft", "{f}/short_draft"], "max_length must be at most 256, the context of draft="),
    "unknown reference": (
        ["--selection", "adaspec", "--reference", "other"],
        "reference must be one of ['reference'] in {store}, got reference=other; add it with `logitstore dump",
    ),
    "reference of all": (
        ["--reference", "reference"],
        "reference needs --selection adaspec, got reference=reference without it; add it, or omit --reference",
    ),
    "no reference": (["--selection", "adaspec"], "selection=adaspec needs --reference, got reference=None"),
    "keep 0": (["--keep", "0"], "keep must be above 0 and at most 1, got keep=0.0; 0.4 is usual"),
    "keep 2": (["--keep", "2"], "keep must be above 0 and at most 1, got keep=2.0; 0.4 is usual"),
    "selection": (["--selection", "best"], "selection must be one of ['all', 'random', "),
    "objective": (["--objective", "mse"], "objective must be one of ['forward_kl', 'reverse_kl', "),
    "denominator": (["--denominator", "1"], "denominator must be one of ['kept', 'masked'], got denominator=1"),
    "window": (["--shuffle_window", "9"], "shuffle_window must be between 1 and 4"),
    "taken": (["--output_dir", "{f}/taken"], "output_dir must be new or empty, got output_dir={f}/taken, which holds"),
    "foreign": (
        ["--output_dir", "{f}/foreign"],
        "got output_dir={f}/foreign, which holds other files, such as README.md",
    ),
    "foreign, resumed": (
        ["--output_dir", "{f}/foreign", "--resume_from_checkpoint", "true"],
        "got output_dir={f}/foreign, which holds other files, such as README.md",
    ),
    "stopped": (["--output_dir", "{f}/stopped"], "output_dir must be new or empty, got output_dir={f}/stopped"),
    "checkpoint": (
        ["--resume_from_checkpoint", "{f}/stopped/checkpoint-5"],
        "resume_from_checkpoint must be a finished checkpoint folder or true",
    ),
    "flag": (["--keeep", "0.4"], "unrecognized arguments: --keeep 0.4 (did you mean --keep?)"),
    "value": (["--keep", "some"], "argument --keep: invalid float value: 'some'"),
    "evaluation": (["--eval_strategy", "steps", "--eval_steps", "5"], "eval_fraction must be above 0 to evaluate"),
    "liger": (["--use_liger_kernel", "true"], "use_liger_kernel must be False, got use_liger_kernel=True"),
    "bf16": (
        ["--use_cpu", "false", "--bf16", "true"],
        "bf16 needs a GPU that computes in bfloat16, got bf16=True without one; omit --bf16, or ",
    ),
    "options": (["--storage_options", "{f}/none.json"], "storage_options must be a JSON file, got storage_options="),
}


@pytest.mark.parametrize("name", BAD)
def test_invalid_input_exits_with_one_line_and_status_2(name, tiny, tiny_store, misfits, tmp_path, capsys, monkeypatch):
    extra, message = BAD[name]
    if name == "bf16" and is_torch_bf16_gpu_available():
        pytest.skip("this GPU computes in bfloat16")
    if name != "torn weights":
        monkeypatch.setattr("trainer.drafts.source.load_model", refuse_models)
    extra = [value.format(f=misfits) for value in extra]
    with pytest.raises(SystemExit) as exit_:
        train_command.run([*arguments(tiny, tiny_store, tmp_path / "out", *QUIET), *extra])
    captured = capsys.readouterr()
    assert exit_.value.code == 2
    assert message.format(f=misfits, store=tiny_store) in captured.err
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("typo.yaml", "keys of the run file must be names of flags, got 'keeep' in {f}/typo.yaml"),
        ("list.yaml", "run file must contain only `name: value` lines, got {f}/list.yaml"),
        ("broken.yaml", "run file must be a readable YAML file, got {f}/broken.yaml: not YAML (ParserError)"),
        ("word.yaml", "argument --keep: invalid float value: 'some'"),
        ("none.yaml", "run file must be a readable YAML file, got {f}/none.yaml: No such file or directory"),
    ],
)
def test_invalid_run_file_exits_with_one_line_and_status_2(file, message, misfits, capsys):
    with pytest.raises(SystemExit) as exit_:
        train_command.run([str(misfits / file)])
    assert exit_.value.code == 2
    assert message.format(f=misfits) in capsys.readouterr().err


def test_script_exits_with_one_line_and_status_2(tiny, tiny_store, tmp_path):
    script = Path(str(JOBS / "train_draft.py"))
    found = subprocess.run(
        [sys.executable, str(script), *arguments(tiny, tiny_store, tmp_path / "out", "--selection", "adaspec")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith("error: selection=adaspec needs --reference")
    assert found.stderr.count("\n") == 1


def test_credentials_are_not_written_to_the_run_file(tiny, tiny_store, tmp_path):
    (tmp_path / "options.json").write_text('{"auto_mkdir": false, "skip_instance_cache": "hunter2"}')
    extra = ["--storage_options", str(tmp_path / "options.json"), "--max_steps", "1", "--hub_token", "hunter2"]
    train_command.run(arguments(tiny, tiny_store, tmp_path / "out", *extra))
    text = (tmp_path / "out" / "run.yaml").read_text()
    assert "hunter2" not in text
    assert "auto_mkdir" not in text
    assert yaml.safe_load(text)["storage_options"] == str(tmp_path / "options.json")
