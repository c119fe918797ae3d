"""What `logitstore plan` says beforehand, and what a dump then really takes."""

from __future__ import annotations

import json
import re
import sys
from argparse import ArgumentParser
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PADDED_VOCAB_SIZE, VOCAB_SIZE, functions, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from logitstore import assumptions, cli, plan
from logitstore.assumptions import Range, assumed
from logitstore.causal_lm import SplitLM, check_model
from logitstore.dump import planning
from logitstore.dump.documents import prepare
from logitstore.dump.worker import ModelSource, ShardDumper
from logitstore.schemes import OPTIONS, Scheme, make_scheme
from logitstore.spec import LossSpec, ModelSpec, TargetSpec
from logitstore.storage import Storage
from logitstore.writer import add_layer

SHARD_ROWS, MAX_LENGTH = 2048, 256
pytestmark = pytest.mark.usefixtures("datasets_cache")


def planned(capsys, *options):
    """The JSON that the command prints."""
    assert cli.main(["plan", "--json", *map(str, options)]) == 0
    return json.loads(capsys.readouterr().out)


def options_of(tiny, *more):
    return ["--data", tiny.data, "--target", tiny.target, "--max_length", MAX_LENGTH, "--shard_rows", SHARD_ROWS, *more]


def dump(url, tiny, scheme):
    """Makes the store that was planned, with losses of a reference."""
    storage, tokenizer = Storage(url), AutoTokenizer.from_pretrained(tiny.tokenizer)
    store = prepare(
        storage, tiny.data, tokenizer, max_length=MAX_LENGTH, shard_rows=SHARD_ROWS, num_proc=1, progress=False
    )
    model, reference = (
        check_model(
            name, what="model", made=store.spec.tokenizer, max_length=MAX_LENGTH, revision=None, dtype="auto",
            trust_remote_code=False,
        )[0]
        for name in (tiny.target, tiny.reference)
    )  # fmt: skip
    add_layer(storage, store.spec, "target", TargetSpec(model=model, scheme=scheme))
    add_layer(storage, store.spec, "losses/ref", LossSpec(model=reference))
    sources = ModelSource(name=tiny.target), {"ref": ModelSource(name=tiny.reference)}
    dumper = ShardDumper(storage, *sources, batch_tokens=1024, device="cpu")
    for shard in range(store.num_shards):
        dumper.dump(shard, ("target", "losses/ref"))
    return Path(url), store


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(k=20),
        Scheme(name="nucleus", k=64, mass=0.5, k_min=1),
        Scheme(name="sample", k=0, num_draws=30),
        Scheme(name="hybrid", k=0, num_draws=30),
    ],
    ids=lambda scheme: scheme.name,
)
def test_a_calibrated_plan_is_what_the_dump_takes(tiny, tmp_path, capsys, scheme):
    given = [part for name in OPTIONS[scheme.name] if name != "seed" for part in (f"--{name}", getattr(scheme, name))]
    facts = planned(
        capsys, *options_of(tiny, "--reference", f"ref={tiny.reference}", "--calibrate", 99, "--scheme", scheme.name),
        *given,
    )  # fmt: skip
    folder, store = dump(tmp_path / "cache.zarr", tiny, scheme)
    data, (found,) = facts["data"], facts["schemes"]
    for name in ("num_documents", "num_rows", "num_counted"):
        assert data[name.removeprefix("num_")] == [getattr(store, name)] * 2
    assert data["shards"] == [store.num_shards] * 2
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert found["objects"] == [len(files)] * 2
    assert found["bytes"][0] == found["bytes"][1] == pytest.approx(sum(f.stat().st_size for f in files), rel=0.15)
    target = sum(path.stat().st_size for path in (folder / "target").rglob("c/*"))
    assert found["target_bytes_per_counted_row"][0] == pytest.approx(target / store.num_counted, rel=0.15)
    tokens = sum(path.stat().st_size for path in (folder / "tokens").rglob("c/*"))
    assert data["token_bytes"] == pytest.approx(tokens / store.num_rows, rel=0.15)
    assert found["rows_per_s"] > 0
    assert found["hours"] == pytest.approx([store.num_rows / found["rows_per_s"] / 3600] * 2)


@pytest.mark.parametrize("place", [0, 59])  # records are drawn: one of the two is not the first
def test_records_without_documents_are_not_among_those_that_calibrate(tiny, tmp_path, capsys, place):
    records = [{"input_ids": [5, 6, 7, 8], "loss_mask": [0, 0, 0, 0]}] * 60
    records[place] = {"input_ids": [5, 6, 7, 8], "loss_mask": [0, 0, 1, 1]}
    data = write_jsonl(tmp_path / "one.jsonl", records)
    facts = planned(capsys, *options_of(tiny, "--calibrate", 1), "--data", data)
    assert facts["calibrated"].endswith(": 1 documents, 4 rows of which 2 count")


BAD = {"target": 400, "reference": 401}
"""The token that a model of `broken` gives NaN with."""


@pytest.fixture(scope="module")
def broken(tiny, tmp_path_factory):
    """Models that give NaN from one token on, a target and a reference."""
    folder = tmp_path_factory.mktemp("broken")
    for name, token in BAD.items():
        model = AutoModelForCausalLM.from_pretrained(getattr(tiny, name))
        with torch.no_grad():
            model.get_input_embeddings().weight[token] = float("nan")
        model.save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(tiny.tokenizer).save_pretrained(folder / name)
    return folder


class Clock:
    """Goes on a second whenever it is read."""

    now = 0

    def perf_counter(self):
        self.now += 1
        return self.now


def calibrated(capsys, monkeypatch, broken, documents, *options):
    """What a plan with all documents measures, where each shard takes a second: the text, and the one scheme."""
    data = write_jsonl(broken / "data.jsonl", [{"input_ids": ids} for ids in documents])
    monkeypatch.setattr(planning, "time", Clock())
    options = ["--scheme", "nucleus", "--calibrate", len(documents), *options]
    facts = planned(capsys, "--data", data, "--target", broken / "target", "--max_length", 64, *options)
    (found,) = facts["schemes"]
    return facts["calibrated"].partition(": ")[2], found


GOOD = [[i, *range(10, 10 + 4 * i)] for i in range(2, 6)]
ROWS, COUNTED = sum(map(len, GOOD)), sum(len(ids) - 1 for ids in GOOD)


@pytest.mark.parametrize("place", range(len(GOOD) + 1))  # one of them is that of the document drawn first
def test_a_document_that_the_target_fails_with_is_no_part_of_the_plan(capsys, monkeypatch, broken, place):
    documents = [*GOOD[:place], [3, BAD["target"], 4], *GOOD[place:]]
    text, found = calibrated(capsys, monkeypatch, broken, documents)
    left_out = "documents left out because a model fails with them: 1"
    assert text == f"{len(GOOD)} documents, {ROWS} rows of which {COUNTED} count; {left_out}"
    assert found["rows_per_s"] == ROWS
    _, without = calibrated(capsys, monkeypatch, broken, GOOD)
    assert found["entries_per_row"] == pytest.approx(without["entries_per_row"])


@pytest.mark.parametrize("shard_rows", [64, 4096], ids=["shards of one document", "one shard"])
def test_what_models_fail_with_is_left_out_of_shards_of_any_size(capsys, monkeypatch, broken, shard_rows):
    long = [[*ids, *range(10, 74 - len(ids))] for ids in GOOD]
    documents = [*long, [3, BAD["target"], *range(10, 72)], [3, BAD["reference"], *range(10, 72)]]
    options = ["--reference", f"ref={broken / 'reference'}", "--shard_rows", shard_rows]
    text, found = calibrated(capsys, monkeypatch, broken, documents, *options)
    left_out = "documents left out because a model fails with them: 2"
    assert text == f"{len(long)} documents, {64 * len(long)} rows of which {63 * len(long)} count; {left_out}"
    assert found["rows_per_s"] == (64 if shard_rows == 64 else 64 * len(long))


def test_a_reference_costs_what_its_own_rows_do(tiny, capsys, monkeypatch, broken):
    """One that fails with half of the documents takes as many bytes a row, of half the rows, as one that does not."""
    documents = np.random.default_rng(0).integers(3, 400, (100, 64)).tolist()
    for ids in documents[::2]:
        ids[0] = BAD["reference"]
    per_row = []
    for reference in (tiny.reference, broken / "reference"):
        _, found = calibrated(capsys, monkeypatch, broken, documents, "--reference", f"ref={reference}")
        _, none = calibrated(capsys, monkeypatch, broken, documents)
        per_row.append((found["bytes"][0] - none["bytes"][0]) / (63 * len(documents)))
    assert per_row[1] == pytest.approx(per_row[0], rel=0.15)


@pytest.mark.parametrize(
    ("documents", "options", "reason"),
    [
        ([[BAD["target"], *ids] for ids in GOOD], [], "got 4 that all fail, document 0: model must give"),
        ([[BAD["reference"], *ids] for ids in GOOD], ["reference"], "got 4 that all fail, document 0: model must give"),
        ([[3, BAD["target"], 4], [3, BAD["reference"], 4]], ["reference"], "got 1 that all fail, document "),
        ([[BAD["reference"], 4], [BAD["target"], 4]], ["swapped", "reference"], "model must give finite numbers, got"),
    ],
    ids=["target", "reference", "each with one", "each reference with one"],
)
def test_a_plan_without_a_document_that_all_models_score_is_refused(
    tiny, tmp_path, capsys, broken, documents, options, reason
):
    data = write_jsonl(tmp_path / "bad.jsonl", [{"input_ids": ids} for ids in documents])
    target = tiny.target if "swapped" in options else broken / "target"
    folders = {"reference": broken / "reference", "swapped": broken / "target"}
    references = [part for name in options for part in ("--reference", f"{name}={folders[name]}")]
    argv = ["plan", *options_of(tiny, "--calibrate", 9), *references, "--data", data, "--target", target]
    assert cli.main(list(map(str, argv))) == 2
    (line,) = capsys.readouterr().err.splitlines()
    start = f"error: calibrate must have a document that all models score, got none in {len(documents)} ("
    assert line.startswith(start)
    assert reason in line
    assert line.endswith("; see that the models run, or take more records with --calibrate")


def test_what_is_slow_once_is_timed_of_no_model(tiny, monkeypatch):
    """Nor where the first documents all fail: the clock jumps at the first pass of each model alone."""
    clock = Clock()
    monkeypatch.setattr(planning, "time", clock)

    def load(name):
        model = AutoModelForCausalLM.from_pretrained(name).eval()
        with torch.no_grad():
            model.get_input_embeddings().weight[BAD["target"]] = float("nan")

        def first_pass(*_):
            clock.now += 1000
            handle.remove()

        handle = model.get_decoder().register_forward_pre_hook(first_pass)
        return SplitLM(model, VOCAB_SIZE)

    target, *references = map(load, (tiny.target, tiny.reference, tiny.draft))
    bad = [[BAD["target"], 5]] * planning.WARM_UP_DOCUMENTS
    documents = [planning.Tokens(np.array(ids), np.arange(len(ids)) < len(ids) - 1) for ids in (*bad, *GOOD)]
    model = ModelSpec(name="target", revision="", dtype="float32", padded_vocab_size=PADDED_VOCAB_SIZE)
    spec = TargetSpec(model=model, scheme=Scheme(k=4))
    found = planning.calibrate(target, references, planning.in_shards(documents, 4096), spec, 4096, 1024)
    assert clock.now >= 3000
    assert found.cost.rows_per_s == found.rows == ROWS


def test_the_range_of_a_sample_holds_what_all_documents_come_to(tiny, tmp_path, capsys):
    data = write_jsonl(tmp_path / "many.jsonl", functions(126))
    base = ["--data", data, "--tokenizer", tiny.tokenizer, "--max_length", 128, "--shard_rows", 1024]
    whole = planned(capsys, *base)["data"]
    assert whole["records"] == whole["sampled"] == 126
    for sampled in (20, 60, 110):
        found = planned(capsys, *base, "--sample_documents", sampled)["data"]
        assert (found["records"], found["sampled"]) == (126, sampled)
        for name in ("documents", "rows", "counted", "shards"):
            assert found[name][0] <= whole[name][0] <= found[name][1]
            assert found[name][0] < found[name][1]
        assert found["token_bytes"] == pytest.approx(whole["token_bytes"], rel=0.15)


def test_one_record_says_little_of_the_others(tiny, capsys):
    found = planned(capsys, *options_of(tiny, "--sample_documents", 1))["data"]
    low, high = found["rows"]
    assert 0 < low < high


def test_without_calibration_no_weights_are_read(tiny, capsys, monkeypatch):
    monkeypatch.setattr(planning, "load_weights", lambda *_, **__: pytest.fail("a model was loaded"))
    facts = planned(capsys, *options_of(tiny, "--rows_per_s", 100, "--num_actors", 2, "--price_per_gb_month", 10))
    assert [one["scheme"].partition(",")[0] for one in facts["schemes"]] == list(OPTIONS)
    for one in facts["schemes"]:
        assert one["hours"] == pytest.approx([facts["data"]["rows"][0] / 200 / 3600] * 2)
        assert one["price_per_month"] == pytest.approx([b * 1e-8 for b in one["bytes"]])
        assert one["bytes"][0] < one["bytes"][1]
    assert all(one["hours"] is None for one in planned(capsys, *options_of(tiny))["schemes"])


def test_the_text_is_a_table_of_aligned_columns(tiny, capsys):
    assert cli.main(["plan", *map(str, options_of(tiny, "--reference", f"ref={tiny.reference}"))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tiny.data}: 24 records (columns: prompt, response), all of them tokenised"
    assert "layers: tokens, target, losses/ref; tokens take " in lines[3]
    start = lines.index("") + 1
    table = lines[start : lines.index("", start)]
    head = r"scheme +entries +target B/row +store +objects +price/month +rows/s +hours"
    assert re.fullmatch(head, table[0])
    assert len(table) == 5
    assert len({len(line) for line in table}) == 1
    assert all(len(line) <= 130 for line in lines[3:])
    assert any("assumed, for targets of 1.2 to 3.0 nats a row" in line for line in lines)
    assert lines[-1] == "hours: unknown without rows/s; give --rows_per_s, or measure them with --calibrate N"


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
        (["--target", "nowhere"], "tokenizer must be a Hugging Face id or a folder with tokenizer files, got"),
        (["--reference", "ref"], "reference must be NAME=MODEL, each NAME once, got reference=ref"),
        (["--reference", "a/b={reference}"], "reference name must be letters, digits, dots, dashes or underscores"),
        (["--storage_options", "nowhere.json"], "storage_options must be a JSON file, got storage_options=now"),
    ],
)
def test_mistakes_are_one_line_before_a_model_is_loaded(tiny, capsys, monkeypatch, options, message):
    monkeypatch.setattr(planning, "load_weights", lambda *_, **__: pytest.fail("a model was loaded"))
    argv = dict(zip(*[iter(map(str, options_of(tiny)))] * 2, strict=True))
    given = [None if value is None else value.format(**vars(tiny)) for value in options]
    argv |= dict(zip(given[::2], given[1::2], strict=True))
    parts = [part for name, value in argv.items() if value is not None for part in (name, value)]
    assert cli.main(["plan", *parts]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith(f"error: {message}")


def test_documents_in_which_nothing_counts_are_refused(tiny, tmp_path, capsys):
    data = write_jsonl(tmp_path / "none.jsonl", [{"input_ids": [1, 2, 3], "loss_mask": [0, 0, 0]}] * 3)
    assert cli.main(["plan", "--data", data, "--tokenizer", tiny.tokenizer]) == 2
    assert "data must hold documents of 2 tokens of which one counts, got data=" in capsys.readouterr().err


def test_plan_without_the_packages_of_the_dump_says_which(tiny, capsys, monkeypatch):
    monkeypatch.delattr("logitstore.dump.planning")
    monkeypatch.setitem(sys.modules, "logitstore.dump.planning", None)
    assert cli.main(["plan", "--data", tiny.data, "--target", tiny.target]) == 2
    assert "pip install 'logitstore[dump]'" in capsys.readouterr().err


MEASURED = {
    "topk": (64.0, 64.0, 76.5, 79.3),
    "nucleus": (13.6, 51.6, 23.2, 65.2),
    "sample": (6.55, 18.1, 20.0, 46.6),
    "hybrid": (7.5, 20.8, 17.5, 44.1),
}
"""Entries and bytes a row of the model of 32,768 tokens that the assumptions come from, at 1.2 and 3.0 nats."""


@pytest.mark.parametrize("name", OPTIONS)
def test_assumptions_hold_what_they_were_made_from(name):
    cost = assumed(make_scheme(name, {}), 32768)
    few, many, least, most = MEASURED[name]
    assert (cost.entries.low, cost.entries.high) == (pytest.approx(few, rel=0.05), pytest.approx(many, rel=0.05))
    assert cost.target_bytes.low <= least < most <= cost.target_bytes.high


@pytest.mark.parametrize(
    ("name", "option", "values"),
    [
        ("topk", "k", [1, 8, 64, 512]),
        ("nucleus", "mass", [0.3, 0.8, 0.9, 0.93, 0.98, 0.985, 0.99, 0.999, 1.0]),
        ("nucleus", "k", [4, 8, 64, 512, 4096]),
        ("sample", "num_draws", [2, 5, 10, 30, 100, 400, 4096]),
        ("hybrid", "num_draws", [2, 5, 10, 30, 100, 400, 4096]),
    ],
)
def test_more_entries_are_assumed_to_cost_more(name, option, values):
    costs = [assumed(make_scheme(name, {option: value}), 128_256) for value in values]
    for cost in costs:
        assert 1 <= cost.entries.low <= cost.entries.high
        assert 0 < cost.target_bytes.low < cost.target_bytes.high
    for end in ("low", "high"):
        for what in ("entries", "target_bytes"):
            numbers = [getattr(getattr(cost, what), end) for cost in costs]
            assert numbers == sorted(numbers)


def test_no_more_entries_are_assumed_than_there_are_tokens():
    assert assumed(Scheme(name="nucleus", k=512, mass=0.99, k_min=4), 30).entries.high == 30


def test_ranges_add_and_multiply_at_both_ends():
    assert Range(1, 2) + Range(10, 20) == Range(11, 22)
    assert Range(1, 2) * Range(3, 4) == Range(3, 8)
    assert Range(1, 2) * 5 == Range(5, 10)
    assert assumptions.ENTROPY == (1.2, 3.0)


def test_every_option_of_a_scheme_is_one_of_plan():
    parser = ArgumentParser()
    plan.add_arguments(parser)
    names = {name for options in OPTIONS.values() for name in options} - {"seed"}
    assert names <= set(vars(parser.parse_args(["--data", "x"])))
