"""What `logitstore info` says, and the command lines that `logitstore verify --repair` gives."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import dump_logits
import pytest
from dumped import documents, make, prepare_tokens, record, write_data

import logitstore
from logitstore import cli
from logitstore.format.schemes import OPTIONS, Scheme, make_scheme
from logitstore.format.spec import Append, ModelSpec
from logitstore.inspection import info, rerun
from logitstore.storage.storage import Storage
from logitstore.store import writer
from logitstore.store.commits import set_aside
from logitstore.store.take_back import take_back

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    return make(tmp_path_factory.mktemp("cli"), tiny)


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


def test_info_needs_no_record_but_for_what_was_measured(url, capsys):
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
    assert "  documents set aside: 2; the model failed with them, and they are read as masked\n" in text
    assert "    document 1: RuntimeError: of the first shard\n" in text
    assert "    document 4: ValueError: ?[2Jof the third second line\n" in text
    facts = json.loads(shown(url, capsys, "--json"))["layers"]["target"]
    assert [one["document"] for one in facts["first_documents_set_aside"]] == [1, 4]
    assert facts["documents_set_aside"] == 2
    record(url, "target", 0).write_text("{")
    assert "document 4" in shown(url, capsys)


def test_info_names_twenty_and_says_how_many_more(url, made, capsys, monkeypatch):
    monkeypatch.setattr(info, "MAX_SHOWN", 2)
    for shard in (0, 1, 2):
        set_documents_aside(url, shard, {0: "no"})
        set_aside.record(Storage(url), "losses/reference", shard, f"boom {shard}", 3)
        record(url, "losses/reference", shard).unlink()
    text = shown(url, capsys)
    assert text.count("    document ") == 2
    assert text.count("    and 1 more\n") == 2
    assert "  shards set aside: 3; they failed again and again, and the same dump tries them again\n" in text
    assert text.count("    shard ") == 2
    assert "shard 0 (3 times, 2" in text
    assert "): boom 0\n" in text
    facts = json.loads(shown(url, capsys, "--json"))["layers"]["losses/reference"]
    assert facts["shards_set_aside"] == 3
    assert facts["first_shards_set_aside"][1]["reason"] == "boom 1"


def test_info_says_which_documents_came_by_which_append(url, made, tmp_path, capsys):
    more = write_data(tmp_path / "more.jsonl", documents(made.tokenizer, 5, 9))
    prepare_tokens(url, made, more, append=True)
    text = shown(url, capsys)
    assert "  11 documents, " in text
    assert f"  append 1: 4 documents in 2 shards from {more}\n" in text
    assert "target: 4 of 6 shards (66%), missing 4-5, " in text
    facts = json.loads(shown(url, capsys, "--json"))
    assert facts["appends"] == [{"source": more, "first_shard": 4, "shards": 2, "documents": 4}]


def test_info_says_how_far_a_store_is(url, capsys):
    for shard in (1, 3):
        record(url, "tokens", shard).unlink()
    text = shown(url, capsys)
    assert "  2 documents so far, " in text
    assert "tokens: 2 of 4 shards (50%), missing 1, 3, " in text


@pytest.mark.parametrize(
    ("shards", "expected"),
    [
        ([("tokens", 2)], ["--data 'my data.jsonl' --tokenizer tok --shard_rows 128"]),
        (
            [("tokens", 0), ("tokens", 5), ("tokens", 6)],
            ["--data 'my data.jsonl' --tokenizer tok --shard_rows 128", "--data b --tokenizer tok --shard_rows 128"],
        ),
        (
            [("target", 0)],
            [f"--target org/big --revision {'a' * 40} --scheme nucleus --k 6 --mass 0.9 --k_min 2 --dtype float32"],
        ),
        ([("losses/reference", 0)], ["--reference 'reference=a b' --dtype float32"]),
        (
            [("losses/reference", 0), ("tokens", 0), ("target", 1)],
            [
                "--data 'my data.jsonl' --tokenizer tok --shard_rows 128",
                "--target org/big --revision " + "a" * 40 + " --scheme nucleus --k 6 --mass 0.9 --k_min 2 "
                "--reference 'reference=a b' --dtype float32",
            ],
        ),
    ],
)
def test_commands_write_again_what_was_taken_back(made, shards, expected):
    store = logitstore.open(made.url)
    model = ModelSpec(name="org/big", revision="a" * 40, dtype="float32", padded_vocab_size=520)
    data = dataclasses.replace(store.spec.data, source="my data.jsonl")
    store.spec = dataclasses.replace(
        store.spec,
        data=data,
        tokenizer=dataclasses.replace(store.spec.tokenizer, name="tok"),
        appends=tuple(
            Append(data=dataclasses.replace(data, source=name), first_shard=first, num_shards=1)
            for name, first in (("a", 4), ("b", 5), ("b", 6))
        ),
        target=dataclasses.replace(
            store.spec.target, model=model, scheme=Scheme(name="nucleus", k=6, mass=0.9, k_min=2)
        ),
        losses={"reference": dataclasses.replace(store.spec.losses["reference"],
                                                 model=dataclasses.replace(model, name="a b"))},
    )  # fmt: skip
    job = f"python jobs/dump_logits.py --store {made.url} "
    assert rerun.commands(store, shards) == [job + line for line in expected]


@pytest.mark.parametrize("name", OPTIONS)
def test_commands_name_the_scheme_and_its_options(made, name):
    store = logitstore.open(made.url)
    scheme = make_scheme(name, {})
    store.spec = dataclasses.replace(store.spec, target=dataclasses.replace(store.spec.target, scheme=scheme))
    options = "".join(f" --{option} {value}" for option, value in OPTIONS[name].items())
    (command,) = rerun.commands(store, [("target", 1)])
    assert f" --scheme {name}{options} --dtype" in command
    args = dump_logits.parser().parse_args(shlex.split(command)[2:])
    assert make_scheme(args.scheme, {option: getattr(args, option) for option in OPTIONS[name]}) == scheme


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["frobnicate", "x"], "argument COMMAND: invalid choice: 'frobnicate'"),
        (["info"], "the following arguments are required: URL"),
        (["verify", "x", "--num_threads", "many"], "argument --num_threads: invalid int value: 'many'"),
        (["fidelity", "x", "--plto", "y"], "unrecognized arguments: --plto y"),
        (["export", "x", "--shard", "0"], "the following arguments are required: --out"),
    ],
)
def test_arguments_that_do_not_parse_are_one_line(argv, message, capsys):
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: arguments must parse, got: {message}")
    assert err.endswith("; see --help\n")
    assert err.count("\n") == 1


def test_a_number_of_threads_that_is_none_is_told_before_there_is_a_bar(url, capsys):
    assert cli.main(["verify", str(url), "--num_threads", "0"]) == 2
    assert capsys.readouterr().err == "error: num_threads must be at least 1, got num_threads=0; 4 is usual\n"


@pytest.mark.parametrize("argv", [["info", "--json"], ["info"], ["fidelity"], ["verify"], ["--help"]])
def test_a_reader_who_has_seen_enough_ends_the_command_quietly(made, argv):
    command = [sys.executable, "-m", "logitstore.cli", *argv, *([str(made.url)] if argv != ["--help"] else [])]
    # the output waits for the end, as it does in a pipe
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
