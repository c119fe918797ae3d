"""Output of `logitstore info`, and invalid arguments of all commands."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time

import pytest

import logitstore
from logitstore.commands import main as cli
from logitstore.inspection import info
from logitstore.storage.storage import Storage
from logitstore.store import writer
from logitstore.store.commits import set_aside
from logitstore.store.take_back import take_back
from tests.helpers.dumped import documents, prepare_tokens, record, write_data
from tests.helpers.paths import ROOT


@pytest.fixture
def url(made, tmp_path):
    return shutil.copytree(made.url, tmp_path / "cache.zarr")


def shown(url, capsys, *options):
    assert cli.main(["info", *options, str(url)]) == 0
    return capsys.readouterr().out


def set_documents_aside(url, shard, reasons):
    """Writes a shard of the target again, without some documents."""
    store = logitstore.open(url)
    commit, arrays = store.reader.commit("target", shard), store.reader.read_arrays("target", shard)
    take_back(store.storage, "target", shard)
    writer.LayerWriter(store.storage, store.spec, "target").write(
        shard, arrays, documents=commit.documents, rows=commit.rows, counted=commit.counted,
        computed_from=commit.computed_from, started=time.monotonic(), set_aside=reasons,
    )  # fmt: skip


def test_info_reads_records_only_for_the_measured_fidelity(url, capsys):
    whole = json.loads(shown(url, capsys, "--json"))
    for path in (url / "commits").rglob("*.json"):
        path.write_bytes(b"")
    for name in ("target", "losses/reference"):
        assert whole["layers"][name]["fidelity"] is not None
        whole["layers"][name]["fidelity"] = None
    assert json.loads(shown(url, capsys, "--json")) == whole
    assert whole["documents"] == 7
    assert whole["layers"]["target"]["shards"] == 4
    assert "seconds" not in whole["layers"]["target"]


def test_info_names_documents_set_aside_by_their_number_in_the_store(url, capsys):
    set_documents_aside(url, 0, {1: "RuntimeError: of the first shard"})
    set_documents_aside(url, 2, {0: "ValueError: \x1b[2Jof the third\nsecond line"})
    text = shown(url, capsys)
    assert "  documents set aside: 2; the model failed on them, and readers get them with loss mask 0\n" in text
    assert "    document 1: RuntimeError: of the first shard\n" in text
    assert "    document 4: ValueError: ?[2Jof the third second line\n" in text
    facts = json.loads(shown(url, capsys, "--json"))["layers"]["target"]
    assert [one["document"] for one in facts["first_documents_set_aside"]] == [1, 4]
    assert facts["documents_set_aside"] == 2
    record(url, "target", 0).write_text("{")
    assert "document 4" in shown(url, capsys)


def test_info_lists_at_most_max_shown_items_and_counts_the_others(url, made, capsys, monkeypatch):
    monkeypatch.setattr(info, "MAX_SHOWN", 2)
    for shard in (0, 1, 2):
        set_documents_aside(url, shard, {0: "no"})
        set_aside.record(Storage(url), "losses/reference", shard, f"boom {shard}", 3)
        record(url, "losses/reference", shard).unlink()
    text = shown(url, capsys)
    assert text.count("    document ") == 2
    assert text.count("    and 1 more\n") == 2
    assert "  shards set aside: 3; every attempt failed, and the next run of the same dump tries them again\n" in text
    assert text.count("    shard ") == 2
    assert "shard 0 (3 times, 2" in text
    assert "): boom 0\n" in text
    facts = json.loads(shown(url, capsys, "--json"))["layers"]["losses/reference"]
    assert facts["shards_set_aside"] == 3
    assert facts["first_shards_set_aside"][1]["reason"] == "boom 1"


def test_info_shows_the_documents_of_each_append(url, made, tmp_path, capsys):
    more = write_data(tmp_path / "more.jsonl", documents(made.tokenizer, 5, 9))
    prepare_tokens(url, made, more, append=True)
    text = shown(url, capsys)
    assert "  11 documents, " in text
    assert f"  append 1: 4 documents in 2 shards from {more}\n" in text
    assert "target: 4 of 6 shards (66%), missing 4-5, " in text
    facts = json.loads(shown(url, capsys, "--json"))
    assert facts["appends"] == [{"source": more, "first_shard": 4, "shards": 2, "documents": 4}]


def test_info_shows_the_progress_of_an_unfinished_store(url, capsys):
    for shard in (1, 3):
        record(url, "tokens", shard).unlink()
    text = shown(url, capsys)
    assert "  2 documents so far, " in text
    assert "tokens: 2 of 4 shards (50%), missing 1, 3, " in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["info"], "the following arguments are required: URL"),
        (["verify", "x", "--num_threads", "many"], "argument --num_threads: invalid int value: 'many'"),
        (["fidelity", "x", "--smaple", "1"], "unrecognized arguments: --smaple (did you mean --sample?)"),
        (["dump", "--stor", "x"], "unrecognized arguments: --stor (did you mean --store?)"),
        (["dump", "--store", "x", "--scheme", "hybird"], "argument --scheme: invalid choice: 'hybird'"),
        (["info", "x", "--json", "maybe"], "unrecognized arguments: maybe"),
        (["dump", "--store", "x", "--append=maybe"], "argument --append: 'maybe' is neither true nor false"),
        (["export", "x", "--shard", "0"], "the following arguments are required: --out"),
    ],
)
def test_arguments_that_do_not_parse_are_refused_with_one_line(argv, message, capsys):
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {message}")
    assert err.endswith("; see --help\n")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "got none; see logitstore --help"),
        (["frobnicate", "x"], "got frobnicate; see logitstore --help"),
        (["evalaute", "x"], "got evalaute (did you mean evaluate?); see logitstore --help"),
    ],
)
def test_unknown_commands_are_one_line_with_the_nearest_command(argv, message, capsys):
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: command must be one of dump, evaluate, export, fidelity, info, plan, train, verify, ")
    assert err.endswith(f"{message}\n")


@pytest.mark.parametrize("flag", [["--json"], ["--json", "true"], ["--json=1"], ["--json", "false"]])
def test_switches_take_true_or_false_and_never_the_url(made, flag, capsys):
    assert cli.main(["info", *flag, str(made.url)]) == 0
    assert capsys.readouterr().out.startswith("{") == ("false" not in flag)


def test_invalid_num_threads_is_refused_before_a_progress_bar_appears(url, capsys):
    assert cli.main(["verify", str(url), "--num_threads", "0"]) == 2
    assert capsys.readouterr().err == "error: num_threads must be at least 1, got num_threads=0; 4 is usual\n"


@pytest.mark.parametrize("argv", [["info", "--json"], ["info"], ["fidelity"], ["verify"], ["--help"]])
def test_closed_output_pipe_ends_the_command_without_a_message(made, argv):
    url = [str(made.url)] if argv != ["--help"] else []
    command = [sys.executable, "-m", "logitstore.commands.main", *argv, *url]
    # Without PYTHONUNBUFFERED the output is buffered until the end, as is usual in a pipe.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    read, write = os.pipe()
    os.close(read)
    try:
        run = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, check=False, cwd=ROOT, env=env)
    finally:
        os.close(write)
    assert (run.returncode, run.stderr.rpartition(b"\r")[2]) == (141, b"")


def test_info_prints_the_scheme_and_its_options(url, capsys):
    layer = logitstore.open(url).layers["target"].index
    average = layer.entries.sum() / layer.counted.sum()
    assert 1 < average < 6
    assert f"  scheme    sample, num_draws 6, seed 1; {average:.1f} entries on average\n" in shown(url, capsys)
    facts = json.loads(shown(url, capsys, "--json"))["layers"]["target"]
    assert facts["scheme"] == {"line": "sample, num_draws 6, seed 1", "name": "sample", "k": 0, "mass": 1.0,
                               "k_min": 1, "num_draws": 6, "seed": 1}  # fmt: skip
    assert facts["bytes"]["draws"] > 0


def test_info_lists_only_arrays_that_the_scheme_stores_and_all_bytes_of_the_layer(tiny_store, capsys):
    store = logitstore.open(tiny_store)
    facts = json.loads(shown(tiny_store, capsys, "--json"))["layers"]["target"]
    assert "draws" not in facts["bytes"]
    assert sum(facts["bytes"].values()) == store.storage.num_bytes("target")
    table = json.loads(run_fidelity(tiny_store, capsys))["bytes_per_row"]
    assert table == facts["bytes_per_row"]


def run_fidelity(url, capsys):
    assert cli.main(["fidelity", str(url), "--json"]) == 0
    return capsys.readouterr().out
