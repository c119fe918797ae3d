"""The command line of train_draft.py: its help, files of arguments, names mistaken, and a run that only asks."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import _train_arguments
import _train_options
import pytest
import train_draft
import yaml

import logitstore
from trainer import DocumentDataset
from trainer.data.loader import RankBatches, make_loader
from trainer.data.sharding import Deal

SCREEN = (60, 120)
"""Lines and columns of a terminal that is not small."""


def test_help_of_the_jobs_own_options_fits_a_screen():
    found = subprocess.run(
        [sys.executable, train_draft.__file__, "--help"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert len(found) <= SCREEN[0]
    assert max(map(len, found)) <= SCREEN[1]
    text = "\n".join(found)
    for group in _train_options.GROUPS:
        assert f"\n{group._argument_group_name}: " in text
    for name in _train_options.OURS:
        assert f"  --{name} " in text
    assert "--learning_rate" not in text
    assert "--help_all" in text


def test_every_option_says_its_default():
    """Those whose default is no value say in words what happens then, or are only for those who want them."""
    text = _train_options.help_text("")
    for group in _train_options.GROUPS:
        for option in dataclasses.fields(group):
            if option.default in (None, dataclasses.MISSING):
                continue
            (found,) = re.findall(rf"  --{option.name} .*?\[([^\]]*)\](?:\n|$)", text, re.DOTALL)
            assert found.split()[-1] == str(option.default).lower()


def test_all_options_are_shown_to_those_who_ask(capsys):
    assert train_draft.main(["--help_all"]) == {}
    text = capsys.readouterr().out
    assert "--learning_rate" in text
    assert "--keep" in text


@pytest.mark.parametrize(
    ("name", "meant"),
    [("keeep", "--keep"), ("learning-rat", "--learning_rate"), ("refrence=x", "--reference"), ("xyzzy", None)],
)
def test_a_name_mistaken_is_refused_with_the_nearest(name, meant, capsys):
    with pytest.raises(SystemExit):
        train_draft.main(["--store", "s", f"--{name}", "1"])
    err = capsys.readouterr().err
    assert f"unrecognized arguments: --{name}" in err
    assert (f"(did you mean {meant}?)" in err) if meant else "did you mean" not in err
    assert err.count("\n") == 1


def test_a_key_mistaken_in_a_file_is_refused_with_the_nearest(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("store: s\nselektion: adaspec\n")
    with pytest.raises(SystemExit):
        train_draft.main([str(tmp_path / "run.yaml")])
    assert "got 'selektion' in " in (err := capsys.readouterr().err)
    assert "(did you mean selection?)" in err


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    run = {"store": "a", "keep": 0.2, "learning_rate": 3e-4, "draft": "d", "output_dir": "o", "use_cpu": True}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    found, training, _ = _train_arguments.parse([str(tmp_path / "run.yaml"), "--keep", "0.3", "--selection", "random"])
    assert (found.store.store, found.loss.keep, found.loss.selection) == (["a"], 0.3, "random")
    assert (training.learning_rate, training.logging_steps) == (3e-4, 10)


def test_several_stores_and_their_weights_come_from_flags_or_files(tmp_path):
    common = ["--draft", "d", "--output_dir", "o", "--use_cpu", "true"]
    flags, _, values = _train_arguments.parse(["--store", "a", "b", "--store_weights", "1", "0.5", *common])
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(_train_arguments.repeated(values)))
    file, _, _ = _train_arguments.parse([str(tmp_path / "run.yaml")])
    assert flags.store == file.store
    assert (flags.store.store, flags.store.store_weights) == (["a", "b"], [1.0, 0.5])


IN_FILES = {
    "keep: [0.4]": "keep must be one value, got keep=[0.4]; write it as flags have it",
    "draft_config: {hidden_size: 16}": "draft_config must be a list, got draft_config={'hidden_size': 16}; write it",
    "store_weights: [much]": "store_weights must be a list of numbers, got store_weights=['much']; write such as",
}


@pytest.mark.parametrize("line", IN_FILES)
def test_values_of_another_kind_in_a_file_are_refused(line, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(f"store: s\ndraft: d\noutput_dir: o\nuse_cpu: true\n{line}\n")
    with pytest.raises(SystemExit):
        train_draft.main([str(tmp_path / "run.yaml")])
    assert IN_FILES[line] in capsys.readouterr().err


def test_numbers_in_lists_of_a_file_are_read_as_flags_are(tmp_path):
    lines = "store: [a, b]\ndraft: d\noutput_dir: o\nuse_cpu: true\nstore_weights: [1, 5e-1]\nlora_rank: 4\n"
    (tmp_path / "run.yaml").write_text(f"{lines}lora_targets: q_proj\n")
    found, _, _ = _train_arguments.parse([str(tmp_path / "run.yaml")])
    assert (found.store.store_weights, found.draft.lora_targets) == ([1.0, 0.5], ["q_proj"])


BAD = {
    "early": (["--early_stopping", "2"], "eval_strategy must be steps or epoch to stop early, got eval_strategy=no"),
    "nothing": (["--eval_strategy", "epoch"], "eval_fraction must be above 0 to evaluate, got eval_fraction=0"),
    "all": (["--eval_fraction", "1"], "eval_fraction must be at least 0 and below 1, got eval_fraction=1.0"),
    "no reports": (["--report_to", "wandb"], "report_to must be installed here, got report_to=wandb"),
    "scope": (["--selection", "random", "--scope", "all"], "scope must be one of ['document', 'micro_batch', "),
    "initial": (
        ["--selection", "static_gap", "--reference", "r"],
        "initial must be given with selection=static_gap, got initial=None",
    ),
    "one model": (
        ["--selection", "static_gap", "--reference", "r", "--initial", "r"],
        "initial must be other losses than reference, got initial=r for both; give those of the draft as it is now",
    ),
    "queue": (["--queue_rows", "0"], "queue_rows must be at least 1, got queue_rows=0"),
    "beta": (["--objective", "jsd", "--beta", "0"], "beta must be between 0 and 1, got beta=0.0"),
    "no draft": (["--draft_layers", "2"], "draft must be given, got none; add --draft, or --draft_config"),
    "layerwise": (["--optim", "galore_adamw_layerwise"], "optim must be one that waits for the whole gradient, got "),
    "lomo": (["--optim", "lomo"], "optim must be one that waits for the whole gradient, got optim=lomo"),
    "data_seed": (["--data_seed", "-1"], "data_seed must be at least 0 and below 4294967296, got data_seed=-1"),
    "half": (["--fp16", "true"], "fp16 must be False, got fp16=True; leave it out: the head's gradient is made before"),
    "half weights": (["--dtype", "float16"], "dtype must be one of ['auto', 'float32', 'bfloat16'], got dtype=float16"),
    "find": (["--auto_find_batch_size", "true"], "auto_find_batch_size must be False, got auto_find_batch_size=True"),
    "in time": (["--enable_jit_checkpoint", "true"], "enable_jit_checkpoint must be False, got enable_jit_checkpoint="),
    "free": (["--optim", "schedule_free_adamw"], "optim must be one that trains the weights that are evaluated and "),
    "not there": (["--optim", "adamw_bnb_8bit"], "optim must be one that can be made here, got optim=adamw_bnb_8bit "),
    "schedule": (
        ["--lr_scheduler_kwargs", '{"bogus": 1}'],
        "lr_scheduler_kwargs must be what the schedule takes, got lr_scheduler_type=linear with lr_scheduler_kwargs=",
    ),
    "no minimum": (["--lr_scheduler_type", "cosine_with_min_lr"], "got lr_scheduler_type=cosine_with_min_lr with "),
    "split": (["--accelerator_config", '{"split_batches": true}'], "accelerator_config must leave split_batches alone"),
    "label": (["--objective", "label_nll", "--label_weight", "0.3"], "label_weight must be left out where nothing"),
    "targets": (["--lora_targets", "q_proj"], "lora_targets must be left out where nothing heeds it, got "),
    "cache": (["--cache_bytes", "5"], "cache_bytes must be left out where nothing heeds it, got cache_bytes=5"),
    "masked": (["--denominator", "masked"], "denominator must be left out where nothing heeds it, got denominator="),
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
    "unheeded": (["--keep", "0.3"], "keep must be left out where nothing heeds it, got keep=0.3; leave it out, or "),
    "rank": (["--draft", "d", "--lora_rank", "0"], "lora_rank must be at least 1, got lora_rank=0"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_one_line_before_anything_is_read(name, capsys):
    extra, message = BAD[name]
    draft = [] if name == "no draft" else ["--draft", "d"]
    with pytest.raises(SystemExit) as exit_:
        train_draft.main(["--store", "nowhere", "--output_dir", "o", "--use_cpu", "true", *draft, *extra])
    err = capsys.readouterr().err
    assert exit_.value.code == 2
    assert message in err
    assert err.count("\n") == 1


def test_a_dry_run_says_what_a_run_would_be_and_writes_nothing(tiny, tiny_store, tmp_path, capsys):
    argv = ["--store", tiny_store, "--draft", tiny.draft, "--output_dir", str(tmp_path / "out"), "--use_cpu", "true"]
    argv += ["--per_device_train_batch_size", "4", "--eval_fraction", "0.2", "--dry_run", "true"]
    assert train_draft.main([*argv, "--selection", "adaspec", "--reference", "reference"]) == {}
    found = capsys.readouterr().out
    numbers = re.search(r"documents +(\d+) to train on, (\d+) held out", found)
    trained, held = (int(number) for number in numbers.groups())
    assert trained + held == 24
    assert re.search(rf"packs +{trained} in an epoch, one document each; [\d.]+% of the first {trained} packs", found)
    assert held > 0
    steps = -(-trained // 4)
    assert f"steps      {3 * steps} of 4 packs (4 x 1 ranks x 1 micro-batches); {steps} are an epoch" in found
    sizes = {name.strip(): float(size) for name, size in re.findall(r"^  (.*?) +([\d.]+) MiB", found, re.MULTILINE)}
    num_parameters = 18_992
    assert f"{num_parameters:,} parameters" in found
    assert sizes["weights"] == pytest.approx(num_parameters * 4 / 2**20, abs=0.06)
    assert sizes["activations, measured"] > 0
    assert sizes["about, in all"] == pytest.approx(sum(list(sizes.values())[:-1]), abs=0.3)
    assert "dry run: nothing was trained or written" in found
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("packing", [[], ["--packing", "true"], ["--packing", "true", "--pack_length", "5000"]])
def test_a_dry_run_says_what_of_the_batches_is_padding(packing, tiny, tiny_store, tmp_path, capsys):
    argv = ["--store", tiny_store, "--draft", tiny.draft, "--output_dir", str(tmp_path / "out"), "--use_cpu", "true"]
    argv += ["--per_device_train_batch_size", "4", "--dry_run", "true", *packing]
    train_draft.main(argv)
    found = float(re.search(r"([\d.]+)% of the first \d+ packs' batches are padding", capsys.readouterr().out)[1])
    options = {"packing": bool(packing), "pack_length": int(packing[3]) if len(packing) > 2 else None, "seed": 42}
    data = DocumentDataset([logitstore.open(tiny_store)], **options)
    batches = list(make_loader(data, RankBatches(data.order, Deal(per_device_batch=4))))
    num_tokens = sum(len(logitstore.open(tiny_store)[i].ids) for i in range(24))
    assert found == pytest.approx(100 * (1 - num_tokens / sum(b["input_ids"].numel() for b in batches)), abs=0.06)
    assert not Path(tmp_path, "out").exists()
