"""The command line of train_draft.py: help, run files, misspelled names, invalid options, and dry runs."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import logitstore
from tests.helpers.paths import JOBS
from trainer import DocumentDataset
from trainer.commands import train as train_command
from trainer.commands import train_arguments
from trainer.data.loader import RankBatches, make_loader
from trainer.data.sharding import Deal
from trainer.run import options

SCREEN = (60, 120)
"""Lines and columns of a large terminal."""


def test_help_of_the_jobs_own_options_fits_a_screen():
    found = subprocess.run(
        [sys.executable, str(JOBS / "train_draft.py"), "--help"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert len(found) <= SCREEN[0]
    assert max(map(len, found)) <= SCREEN[1]
    text = "\n".join(found)
    for group in options.GROUPS:
        assert f"\n{group._argument_group_name}: " in text
    for name in options.OURS:
        assert f"  --{name} " in text
    assert "--learning_rate" not in text
    assert "--help_all" in text


def test_help_shows_the_default_of_every_option():
    """Options without a default value are skipped: their help text describes the default in words."""
    text = train_arguments.help_text("")
    for group in options.GROUPS:
        for option in dataclasses.fields(group):
            if option.default in (None, dataclasses.MISSING):
                continue
            (found,) = re.findall(rf"  --{option.name} .*?\[([^\]]*)\](?:\n|$)", text, re.DOTALL)
            assert found.split()[-1] == str(option.default).lower()


def test_help_all_shows_the_options_of_transformers(capsys):
    assert train_command.run(["--help_all"]) == {}
    text = capsys.readouterr().out
    assert "--learning_rate" in text
    assert "--keep" in text


@pytest.mark.parametrize(
    ("name", "meant"),
    [("keeep", "--keep"), ("learning-rat", "--learning_rate"), ("refrence=x", "--reference"), ("xyzzy", None)],
)
def test_misspelled_flag_is_refused_with_the_nearest_one(name, meant, capsys):
    with pytest.raises(SystemExit):
        train_command.run(["--store", "s", f"--{name}", "1"])
    err = capsys.readouterr().err
    assert f"unrecognized arguments: --{name}" in err
    assert (f"(did you mean {meant}?)" in err) if meant else "did you mean" not in err
    assert err.count("\n") == 1


def test_misspelled_key_in_a_run_file_is_refused_with_the_nearest_one(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("store: s\nselektion: adaspec\n")
    with pytest.raises(SystemExit):
        train_command.run([str(tmp_path / "run.yaml")])
    assert "got 'selektion' in " in (err := capsys.readouterr().err)
    assert "(did you mean selection?)" in err


def test_flags_override_the_run_file_and_the_run_file_overrides_defaults(tmp_path):
    run = {"store": "a", "keep": 0.2, "learning_rate": 3e-4, "draft": "d", "output_dir": "o", "use_cpu": True}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    found, training, _ = train_arguments.parse([str(tmp_path / "run.yaml"), "--keep", "0.3", "--selection", "random"])
    assert (found.store.store, found.loss.keep, found.loss.selection) == (["a"], 0.3, "random")
    assert (training.learning_rate, training.logging_steps) == (3e-4, 10)


def test_stores_and_their_weights_can_come_from_flags_or_a_run_file(tmp_path):
    common = ["--draft", "d", "--output_dir", "o", "--use_cpu", "true"]
    flags, _, values = train_arguments.parse(["--store", "a", "b", "--store_weights", "1", "0.5", *common])
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(train_arguments.repeated(values)))
    file, _, _ = train_arguments.parse([str(tmp_path / "run.yaml")])
    assert flags.store == file.store
    assert (flags.store.store, flags.store.store_weights) == (["a", "b"], [1.0, 0.5])


IN_FILES = {
    "keep: [0.4]": "keep must be one value, got keep=[0.4]; write it as the flag takes it",
    "draft_config: {hidden_size: 16}": "draft_config must be a list, got draft_config={'hidden_size': 16}; write it",
    "store_weights: [much]": "store_weights must be a list of numbers, got store_weights=['much']; write it like",
}


@pytest.mark.parametrize("line", IN_FILES)
def test_values_of_the_wrong_type_in_a_run_file_are_refused(line, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(f"store: s\ndraft: d\noutput_dir: o\nuse_cpu: true\n{line}\n")
    with pytest.raises(SystemExit):
        train_command.run([str(tmp_path / "run.yaml")])
    assert IN_FILES[line] in capsys.readouterr().err


def test_lists_in_a_run_file_are_parsed_like_flags(tmp_path):
    lines = "store: [a, b]\ndraft: d\noutput_dir: o\nuse_cpu: true\nstore_weights: [1, 5e-1]\nlora_rank: 4\n"
    (tmp_path / "run.yaml").write_text(f"{lines}lora_targets: q_proj\n")
    found, _, _ = train_arguments.parse([str(tmp_path / "run.yaml")])
    assert (found.store.store_weights, found.draft.lora_targets) == ([1.0, 0.5], ["q_proj"])


BAD = {
    "early": (["--early_stopping", "2"], "eval_strategy must be steps or epoch to stop early, got eval_strategy=no"),
    "nothing": (["--eval_strategy", "epoch"], "eval_fraction must be above 0 to evaluate, got eval_fraction=0"),
    "all": (["--eval_fraction", "1"], "eval_fraction must be at least 0 and below 1, got eval_fraction=1.0"),
    "no reports": (["--report_to", "wandb"], "report_to must be installed here, got report_to=wandb"),
    "scope": (["--selection", "random", "--scope", "all"], "scope must be one of ['document', 'micro_batch', "),
    "initial": (
        ["--selection", "static_gap", "--reference", "r"],
        "selection=static_gap needs --initial, got initial=None",
    ),
    "one model": (
        ["--selection", "static_gap", "--reference", "r", "--initial", "r"],
        "initial must differ from reference, got initial=r for both; give the losses of the draft before this training",
    ),
    "queue": (["--queue_rows", "0"], "queue_rows must be at least 1, got queue_rows=0"),
    "beta": (["--objective", "jsd", "--beta", "0"], "beta must be between 0 and 1, got beta=0.0"),
    "no draft": (["--draft_layers", "2"], "draft must be given, got none; add --draft, or --draft_config"),
    "layerwise": (["--optim", "galore_adamw_layerwise"], "optim must be one that updates the weights after the whole "),
    "lomo": (["--optim", "lomo"], "optim must be one that updates the weights after the whole "),
    "data_seed": (["--data_seed", "-1"], "data_seed must be at least 0 and below 4294967296, got data_seed=-1"),
    "half": (["--fp16", "true"], "fp16 must be False, got fp16=True (bf16 is supported; with fp16, "),
    "half weights": (["--dtype", "float16"], "dtype must be one of ['auto', 'float32', 'bfloat16'], got dtype=float16"),
    "find": (["--auto_find_batch_size", "true"], "auto_find_batch_size must be False, got auto_find_batch_size=True"),
    "in time": (["--enable_jit_checkpoint", "true"], "enable_jit_checkpoint must be False, got enable_jit_checkpoint="),
    "free": (["--optim", "schedule_free_adamw"], "optim must train the same weights that are evaluated and "),
    "not there": (
        ["--optim", "adamw_bnb_8bit"],
        "optim must be one that this installation can create, got optim=adamw_bnb_8bit ",
    ),
    "schedule": (
        ["--lr_scheduler_kwargs", '{"bogus": 1}'],
        "lr_scheduler_kwargs must fit the schedule, got lr_scheduler_type=linear with lr_scheduler_kwargs=",
    ),
    "no minimum": (["--lr_scheduler_type", "cosine_with_min_lr"], "got lr_scheduler_type=cosine_with_min_lr with "),
    "split": (
        ["--accelerator_config", '{"split_batches": true}'],
        "accelerator_config must not set split_batches, got split_batches=True",
    ),
    "label": (["--objective", "label_nll", "--label_weight", "0.3"], "label_weight needs an --objective other than "),
    "targets": (["--lora_targets", "q_proj"], "lora_targets needs --lora_rank, got lora_targets="),
    "cache": (["--cache_bytes", "5"], "cache_bytes needs --cache_dir, got cache_bytes=5 without it"),
    "masked": (["--denominator", "masked"], "denominator needs a --selection other than all, got denominator="),
    "batch": (
        ["--per_device_train_batch_size", "0"],
        "per_device_train_batch_size must be at least 1, got per_device_train_batch_size=0; change --per_device_train_",
    ),
    "accumulation": (["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps must be at least 1, got "),
    "rate": (["--learning_rate", "-1"], "learning_rate must be at least 0, got learning_rate=-1.0; change --learning"),
    "no rate": (["--learning_rate", "nan"], "learning_rate must be at least 0, got learning_rate=nan"),
    "infinite rate": (["--learning_rate", "inf"], "learning_rate must be at least 0, got learning_rate=inf"),
    "adam": (["--adam_beta2", "1"], "adam_beta2 must be at least 0 and below 1, got adam_beta2=1.0"),
    "epochs": (["--num_train_epochs", "0"], "num_train_epochs must be above 0, got num_train_epochs=0.0; change it, "),
    "choices": (["--optim", "adamw_torhc"], "invalid choice: 'adamw_torhc' (did you mean adamw_torch?); see --help"),
    "no choice": (["--optim", "quux"], "invalid choice: 'quux'; see --help"),
    "few choices": (["--save_strategy", "never"], "invalid choice: 'never' (choose from 'no', 'steps', 'epoch', "),
    "weights alone": (["--save_only_model", "true"], "save_only_model must be False, got save_only_model=True"),
    "unheeded": (
        ["--keep", "0.3"],
        "keep needs a --selection that keeps a fraction, such as adaspec, got keep=0.3 without it; add it, or omit ",
    ),
    "rank": (["--draft", "d", "--lora_rank", "0"], "lora_rank must be at least 1, got lora_rank=0"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_invalid_options_are_refused_with_one_line_before_reading(name, capsys):
    extra, message = BAD[name]
    draft = [] if name == "no draft" else ["--draft", "d"]
    with pytest.raises(SystemExit) as exit_:
        train_command.run(["--store", "nowhere", "--output_dir", "o", "--use_cpu", "true", *draft, *extra])
    err = capsys.readouterr().err
    assert exit_.value.code == 2
    assert message in err
    assert err.count("\n") == 1


def test_dry_run_shows_steps_and_memory_and_writes_nothing(tiny, tiny_store, tmp_path, capsys):
    argv = ["--store", tiny_store, "--draft", tiny.draft, "--output_dir", str(tmp_path / "out"), "--use_cpu", "true"]
    argv += ["--per_device_train_batch_size", "4", "--eval_fraction", "0.2", "--dry_run", "true"]
    assert train_command.run([*argv, "--selection", "adaspec", "--reference", "reference"]) == {}
    found = capsys.readouterr().out
    numbers = re.search(r"documents +(\d+) to train on, (\d+) held out", found)
    trained, held = (int(number) for number in numbers.groups())
    assert trained + held == 24
    assert re.search(rf"packs +{trained} in an epoch, one document each; [\d.]+% of the first {trained} packs", found)
    assert held > 0
    steps = -(-trained // 4)
    assert f"steps      {3 * steps} of 4 packs (4 x 1 ranks x 1 micro-batches); {steps} per epoch" in found
    sizes = {name.strip(): float(size) for name, size in re.findall(r"^  (.*?) +([\d.]+) MiB", found, re.MULTILINE)}
    num_parameters = 18_992
    assert f"{num_parameters:,} parameters" in found
    assert sizes["weights"] == pytest.approx(num_parameters * 4 / 2**20, abs=0.06)
    assert sizes["activations, measured"] > 0
    assert sizes["total, about"] == pytest.approx(sum(list(sizes.values())[:-1]), abs=0.3)
    assert "dry run: nothing was trained or written" in found
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("packing", [[], ["--packing", "true"], ["--packing", "true", "--pack_length", "5000"]])
def test_dry_run_shows_the_share_of_padding(packing, tiny, tiny_store, tmp_path, capsys):
    argv = ["--store", tiny_store, "--draft", tiny.draft, "--output_dir", str(tmp_path / "out"), "--use_cpu", "true"]
    argv += ["--per_device_train_batch_size", "4", "--dry_run", "true", *packing]
    train_command.run(argv)
    found = float(re.search(r"([\d.]+)% of the first \d+ packs' batches are padding", capsys.readouterr().out)[1])
    options = {"packing": bool(packing), "pack_length": int(packing[3]) if len(packing) > 2 else None, "seed": 42}
    data = DocumentDataset([logitstore.open(tiny_store)], **options)
    batches = list(make_loader(data, RankBatches(data.order, Deal(per_device_batch=4))))
    num_tokens = sum(len(logitstore.open(tiny_store)[i].ids) for i in range(24))
    assert found == pytest.approx(100 * (1 - num_tokens / sum(b["input_ids"].numel() for b in batches)), abs=0.06)
    assert not Path(tmp_path, "out").exists()
