"""Invalid options of `logitstore plan`, and models with missing files: each is refused with one line."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from logitstore.commands import main as cli
from logitstore.dump.planning import survey
from tests.helpers.plans import options_of, refused
from tests.helpers.tiny import write_jsonl

pytestmark = pytest.mark.usefixtures("datasets_cache")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", None], "target or tokenizer must be given, got neither; add --target, or --tokenizer"),
        (
            ["--target", None, "--tokenizer", "{tokenizer}", "--calibrate", "2"],
            "calibrate needs --target, got calibrate=2",
        ),
        (["--k", "8"], "k needs --scheme, got k=8 without it; add the --scheme that has this option"),
        (["--scheme", "topk", "--mass", "0.9"], "mass needs --scheme nucleus, got mass=0.9 with --scheme topk"),
        (["--scheme", "topk", "--k", "513"], "k must be at most the vocabulary size 512, got k=513"),
        (["--sample_documents", "0"], "sample_documents must be above 0, got sample_documents=0"),
        (["--calibrate", "-1"], "calibrate must be above 0, got calibrate=-1"),
        (["--calibrate", "1", "--rows_per_s", "5"], "rows_per_s must be omitted with --calibrate, which measures"),
        (["--price_per_gb_month", "-1"], "price_per_gb_month must be at least 0, got price_per_gb_month=-1.0"),
        (["--max_length", "0"], "max_length must be at least 2, got max_length=0"),
        (["--max_length", "900"], "max_length must be at most 512, the context of target="),
        (["--shard_rows", "100"], "shard_rows must be at least max_length=256 because documents are never split"),
        (["--data", "nowhere.jsonl"], "data must name a file, a folder or a glob that matches files, got data=nowhere"),
        (["--scheme", "topk", "--seed", "1"], "seed needs --scheme sample or --scheme hybrid, got seed=1"),
        (["--seed", "1"], "seed needs --scheme, got seed=1 without it; add the --scheme that has this option"),
        (
            ["--reference", "ref"],
            "reference must be NAME=MODEL, got reference=ref; example: --reference ref=path/to/model",
        ),
        (["--reference", "a/b={reference}"], "reference name must consist of at most 64 letters, digits"),
        (["--storage_options", "nowhere.json"], "storage_options must be a JSON file, got storage_options=now"),
    ],
)
def test_invalid_options_are_one_line_before_a_model_is_loaded(tiny, capsys, monkeypatch, options, message):
    monkeypatch.setattr(survey, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    argv = dict(zip(*[iter(map(str, options_of(tiny)))] * 2, strict=True))
    given = [None if value is None else value.format(**vars(tiny)) for value in options]
    argv |= dict(zip(given[::2], given[1::2], strict=True))
    parts = [part for name, value in argv.items() if value is not None for part in (name, value)]
    assert refused(capsys, *parts).startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("sampled", "end"),
    [
        (3, "none in 3 records; check the columns and the loss mask"),
        (2, "none in 2 of 3 records; check the columns and the loss mask, or give a larger --sample_documents"),
    ],
)
def test_data_without_tokens_that_count_is_refused(tiny, tmp_path, capsys, sampled, end):
    data = write_jsonl(tmp_path / "none.jsonl", [{"input_ids": [1, 2, 3], "loss_mask": [0, 0, 0]}] * 3)
    line = refused(capsys, "--data", data, "--tokenizer", tiny.tokenizer, "--sample_documents", sampled)
    rule = "data must hold a document of at least 2 tokens in which a prediction counts"
    assert line.startswith(f"error: {rule}, got data=")
    assert line.endswith(end)


def test_plan_without_the_dump_packages_names_the_extra_to_install(tiny, capsys, monkeypatch):
    monkeypatch.delattr("logitstore.dump.planning.survey")
    monkeypatch.delitem(sys.modules, "logitstore.dump.planning.survey")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert cli.main(["plan", "--data", tiny.data, "--target", tiny.target]) == 2
    assert "pip install 'logitstore[dump]'" in capsys.readouterr().err


@pytest.fixture
def lacking(tiny, tmp_path):
    """Function that copies the target without some of its files."""

    def make(*names):
        return Path(shutil.copytree(tiny.target, tmp_path / "lacking", ignore=shutil.ignore_patterns(*names)))

    return make


@pytest.mark.parametrize("role", ["--target", "--reference"])
def test_only_calibration_needs_weights(tiny, capsys, lacking, role):
    folder = lacking("*.safetensors")
    what, given = ("target", folder) if role == "--target" else ("reference r", f"r={folder}")
    assert cli.main(["plan", *map(str, options_of(tiny, role, given))]) == 0
    assert "hours: unknown" in capsys.readouterr().out
    line = refused(capsys, *options_of(tiny, role, given, "--calibrate", 1))
    save = "save the weights in that folder"
    assert line == f"error: {what} must have weights, got {what}={folder} without a .safetensors file; {save}"


def unreadable_weights(folder):
    """Makes a weights file that can be opened but not read, even by root: the first page of a process's memory."""
    (folder / "model.safetensors").symlink_to("/proc/self/mem")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no file here that nobody can read")
def test_unreadable_weights_are_reported_only_if_they_are_needed(tiny, capsys, lacking):
    folder = lacking("*.safetensors")
    unreadable_weights(folder)
    assert cli.main(["plan", *map(str, options_of(tiny, "--target", folder))]) == 0
    capsys.readouterr()
    line = refused(capsys, *options_of(tiny, "--target", folder, "--calibrate", 1))
    assert line.startswith(f"error: target must have weights that can be read, got target={folder} ([Errno 5]")
    assert line.endswith("; check that its files are readable, or copy or download it again")


def test_broken_link_to_weights_counts_as_missing_weights(tiny, capsys, lacking):
    folder = lacking("*.safetensors")
    (folder / "model.safetensors").symlink_to("gone")
    line = refused(capsys, *options_of(tiny, "--target", folder, "--calibrate", 1))
    assert line.startswith(f"error: target must have weights, got target={folder} without")


def test_model_without_a_tokenizer_is_named_with_the_next_step(tiny, capsys, lacking):
    folder = lacking("tokenizer*")
    line = refused(capsys, *options_of(tiny, "--target", folder))
    assert line == f"error: target must have a tokenizer, got target={folder}; save one there"
    line = refused(capsys, *options_of(tiny, "--reference", f"r={folder}"))
    assert line == f"error: reference r must have a tokenizer, got reference r={folder}; save one there"
    line = refused(capsys, *options_of(tiny, "--tokenizer", folder))
    rule = "be a Hugging Face id or a folder with tokenizer files"
    assert line == f"error: tokenizer must {rule}, got tokenizer={folder}; save one there"


@pytest.mark.parametrize("option", ["--target", "--tokenizer", "--reference"])
def test_missing_model_is_named_with_the_next_step(tiny, capsys, option):
    what, given = ("reference r", "r=nothere/model") if option == "--reference" else (option[2:], "nothere/model")
    line = refused(capsys, *options_of(tiny, option, given))
    assert line.startswith(f"error: {what} must be a Hugging Face id or a folder with ")
    assert f", got {what}=nothere/model (" in line
    assert line.endswith("); check the name: it is not a folder here, and it could not be loaded from the hub")


@pytest.mark.parametrize("value", ["bogus", "flash_attention_9"])
def test_unknown_attn_implementation_is_refused_with_one_line(tiny, capsys, value):
    line = refused(capsys, *options_of(tiny, "--calibrate", 3, "--attn_implementation", value))
    start = f"error: attn_implementation must be one that works with target={tiny.target} here, got "
    assert line.startswith(f"{start}attn_implementation={value} (")
    assert line.endswith("is not supported); omit it, or give sdpa or eager")
