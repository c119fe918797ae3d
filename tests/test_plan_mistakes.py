"""Mistakes in what `logitstore plan` is asked for, and models of which something is missing: one line each."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from conftest import write_jsonl
from plans import options_of, refused

from logitstore import cli
from logitstore.dump.planning import survey

pytestmark = pytest.mark.usefixtures("datasets_cache")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", None], "target must be given, got none; give --target, or --tokenizer"),
        (["--target", None, "--tokenizer", "{tokenizer}", "--calibrate", "2"], "target must be given with --calibrate"),
        (["--k", "8"], "k must be left out without --scheme, got k=8; say --scheme of which"),
        (["--scheme", "topk", "--mass", "0.9"], "mass must be left out with --scheme topk, got mass=0.9"),
        (["--scheme", "topk", "--k", "513"], "k must be at most the vocabulary size 512, got k=513"),
        (["--sample_documents", "0"], "sample_documents must be above 0, got sample_documents=0"),
        (["--calibrate", "-1"], "calibrate must be above 0, got calibrate=-1"),
        (["--calibrate", "1", "--rows_per_s", "5"], "rows_per_s must be left out with --calibrate, which measures it"),
        (["--price_per_gb_month", "-1"], "price_per_gb_month must be at least 0, got price_per_gb_month=-1.0"),
        (["--max_length", "0"], "max_length must be at least 2, got max_length=0"),
        (["--max_length", "900"], "max_length must be at most 512, the context of target="),
        (["--shard_rows", "100"], "shard_rows must be at least max_length=256 because documents are never split"),
        (["--data", "nowhere.jsonl"], "data must name a file, a folder or a glob that matches files, got data=nowhere"),
        (["--scheme", "topk", "--seed", "1"], "seed must be left out with --scheme topk, got seed=1; --scheme sample"),
        (["--seed", "1"], "seed must be left out without --scheme, got seed=1; say --scheme of which"),
        (["--reference", "ref"], "reference must be NAME=MODEL, each NAME once, got reference=ref"),
        (["--reference", "a/b={reference}"], "reference name must be letters, digits, dots, dashes or underscores"),
        (["--storage_options", "nowhere.json"], "storage_options must be a JSON file, got storage_options=now"),
    ],
)
def test_mistakes_are_one_line_before_a_model_is_loaded(tiny, capsys, monkeypatch, options, message):
    monkeypatch.setattr(survey, "load_weights", lambda *_, **__: pytest.fail("a model was loaded"))
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
def test_documents_in_which_nothing_counts_are_refused(tiny, tmp_path, capsys, sampled, end):
    data = write_jsonl(tmp_path / "none.jsonl", [{"input_ids": [1, 2, 3], "loss_mask": [0, 0, 0]}] * 3)
    line = refused(capsys, "--data", data, "--tokenizer", tiny.tokenizer, "--sample_documents", sampled)
    assert line.startswith("error: data must hold documents of 2 tokens of which one counts, got data=")
    assert line.endswith(end)


def test_plan_without_the_packages_of_the_dump_says_which(tiny, capsys, monkeypatch):
    monkeypatch.delattr("logitstore.dump.planning.survey")
    monkeypatch.setitem(sys.modules, "logitstore.dump.planning.survey", None)
    assert cli.main(["plan", "--data", tiny.data, "--target", tiny.target]) == 2
    assert "pip install 'logitstore[dump]'" in capsys.readouterr().err


@pytest.fixture
def lacking(tiny, tmp_path):
    """Makes a copy of the target without some of its files."""

    def make(*names):
        return Path(shutil.copytree(tiny.target, tmp_path / "lacking", ignore=shutil.ignore_patterns(*names)))

    return make


@pytest.mark.parametrize("role", ["--target", "--reference"])
def test_only_a_calibration_needs_weights(tiny, capsys, lacking, role):
    folder = lacking("*.safetensors")
    what, given = ("target", folder) if role == "--target" else ("reference r", f"r={folder}")
    assert cli.main(["plan", *map(str, options_of(tiny, role, given))]) == 0
    assert "hours: unknown" in capsys.readouterr().out
    line = refused(capsys, *options_of(tiny, role, given, "--calibrate", 1))
    assert line == f"error: {what} must have weights, got {what}={folder} without a .safetensors file; save them there"


def unreadable_weights(folder):
    """A file that opens and cannot be read, whoever one is: the first page of a process's memory."""
    (folder / "model.safetensors").symlink_to("/proc/self/mem")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no file here that nobody can read")
def test_weights_that_cannot_be_read_are_one_line_if_they_are_needed(tiny, capsys, lacking):
    folder = lacking("*.safetensors")
    unreadable_weights(folder)
    assert cli.main(["plan", *map(str, options_of(tiny, "--target", folder))]) == 0
    capsys.readouterr()
    line = refused(capsys, *options_of(tiny, "--target", folder, "--calibrate", 1))
    assert line.startswith(f"error: target must have weights that can be read, got target={folder} ([Errno 5]")
    assert line.endswith("; see that they may be read, or copy or download it again")


def test_a_link_to_weights_that_are_gone_is_no_weights(tiny, capsys, lacking):
    folder = lacking("*.safetensors")
    (folder / "model.safetensors").symlink_to("gone")
    line = refused(capsys, *options_of(tiny, "--target", folder, "--calibrate", 1))
    assert line.startswith(f"error: target must have weights, got target={folder} without")


def test_a_model_without_a_tokenizer_is_named_with_what_to_do(tiny, capsys, lacking):
    folder = lacking("tokenizer*")
    line = refused(capsys, *options_of(tiny, "--target", folder))
    assert line == f"error: target must have a tokenizer, got target={folder}; save one there"
    line = refused(capsys, *options_of(tiny, "--reference", f"r={folder}"))
    assert line == f"error: reference r must have a tokenizer, got reference r={folder}; save one there"
    line = refused(capsys, *options_of(tiny, "--tokenizer", folder))
    rule = "be a Hugging Face id or a folder with tokenizer files"
    assert line == f"error: tokenizer must {rule}, got tokenizer={folder}; save one there"


@pytest.mark.parametrize("option", ["--target", "--tokenizer", "--reference"])
def test_a_model_that_is_nowhere_is_named_with_what_to_do(tiny, capsys, option):
    what, given = ("reference r", "r=nothere/model") if option == "--reference" else (option[2:], "nothere/model")
    line = refused(capsys, *options_of(tiny, option, given))
    assert line.startswith(f"error: {what} must be a Hugging Face id or a folder with ")
    assert f", got {what}=nothere/model (" in line
    assert line.endswith("); check the name: it is no folder here, and the hub did not give it")


@pytest.mark.parametrize("value", ["bogus", "flash_attention_9"])
def test_an_attention_that_is_not_there_is_one_line(tiny, capsys, value):
    line = refused(capsys, *options_of(tiny, "--calibrate", 3, "--attn_implementation", value))
    start = f"error: attn_implementation must be one that target={tiny.target} can run with here, got "
    assert line.startswith(f"{start}attn_implementation={value} (")
    assert line.endswith("is not supported); leave it out, or give sdpa or eager")
