"""The predictions of `logitstore plan`, compared with the actual cost of a dump."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from logitstore.commands import main as cli
from logitstore.commands.plan import parser
from logitstore.documents.prepare import prepare
from logitstore.dump.planning import assumptions, survey
from logitstore.dump.planning.assumptions import Range, assumed
from logitstore.dump.worker import ShardDumper
from logitstore.format.schemes import OPTIONS, Scheme, make_scheme
from logitstore.format.spec import LossSpec, TargetSpec
from logitstore.models.identity import check_model
from logitstore.models.loading import ModelSource
from logitstore.storage.storage import Storage
from logitstore.store.writer import add_layer
from tests.helpers.plans import MAX_LENGTH, SHARD_ROWS, options_of, planned, shown
from tests.helpers.tiny import functions, write_jsonl

pytestmark = pytest.mark.usefixtures("datasets_cache")


def dump(url, tiny, scheme):
    """Makes the planned store, with losses of a reference. Returns its folder and the store with its tokens."""
    storage, tokenizer = Storage(url), AutoTokenizer.from_pretrained(tiny.tokenizer)
    store = prepare(
        storage, tiny.data, tokenizer, max_length=MAX_LENGTH, shard_rows=SHARD_ROWS, num_proc=1, progress=False
    )
    model, reference = (
        check_model(ModelSource(name=name), what="model", made=store.spec.tokenizer, max_length=MAX_LENGTH)[0]
        for name in (tiny.target, tiny.reference)
    )
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
def test_calibrated_plan_predicts_the_cost_of_the_dump(tiny, tmp_path, capsys, scheme):
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


def test_range_from_a_sample_contains_the_value_of_all_documents(tiny, tmp_path, capsys):
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


def test_plan_from_one_record_is_marked_as_a_guess(tiny, capsys):
    found = planned(capsys, *options_of(tiny, "--sample_documents", 1))["data"]
    low, high = found["rows"]
    assert 0 < low < high
    lines = shown(capsys, *options_of(tiny, "--sample_documents", 1))
    assert not any("standard errors" in line for line in lines)
    (line,) = (line for line in lines if line.startswith("documents, rows and shards: guessed from one record; "))
    assert len(line) <= 130
    found = planned(capsys, *options_of(tiny, "--sample_documents", 1, "--shard_rows", 2**20))["data"]
    assert found["rows"][1] == pytest.approx(2 * 24 * found["rows"][0])  # the range that the line states


def test_plan_without_calibration_reads_no_weights(tiny, capsys, monkeypatch):
    monkeypatch.setattr(survey, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    facts = planned(capsys, *options_of(tiny, "--rows_per_s", 100, "--num_actors", 2, "--price_per_gb_month", 10))
    assert [one["scheme"].partition(",")[0] for one in facts["schemes"]] == list(OPTIONS)
    for one in facts["schemes"]:
        assert one["hours"] == pytest.approx([facts["data"]["rows"][0] / 200 / 3600] * 2)
        assert one["price_per_month"] == pytest.approx([b * 1e-8 for b in one["bytes"]])
        assert one["bytes"][0] < one["bytes"][1]
    assert all(one["hours"] is None for one in planned(capsys, *options_of(tiny))["schemes"])


def test_plan_prints_a_table_with_aligned_columns(tiny, capsys):
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
    assert any(line.startswith("entries and target B/row: assumed, for targets of 1.2 to 3.0 nats a") for line in lines)
    assert not any("both" in line for line in lines)
    assert lines[-1] == "hours: unknown without rows/s; give --rows_per_s, or measure them with --calibrate N"


MEASURED = {
    "topk": (64.0, 64.0, 76.5, 79.3),
    "nucleus": (13.6, 51.6, 23.2, 65.2),
    "sample": (6.55, 18.1, 20.0, 46.6),
    "hybrid": (7.5, 20.8, 17.5, 44.1),
}
"""Entries and bytes per row at 1.2 and 3.0 nats, for the model of 32,768 tokens on which the assumptions are based."""


@pytest.mark.parametrize("name", OPTIONS)
def test_assumed_ranges_contain_the_measurements_behind_them(name):
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


def test_assumed_entries_are_at_most_the_vocabulary_size():
    assert assumed(Scheme(name="nucleus", k=512, mass=0.99, k_min=4), 30).entries.high == 30


def test_ranges_add_and_multiply_at_both_ends():
    assert Range(1, 2) + Range(10, 20) == Range(11, 22)
    assert Range(1, 2) * Range(3, 4) == Range(3, 8)
    assert Range(1, 2) * 5 == Range(5, 10)
    assert assumptions.ENTROPY == (1.2, 3.0)


def test_counts_of_one_are_printed_in_the_singular(tiny, tmp_path, capsys):
    data = write_jsonl(tmp_path / "one.jsonl", [{"input_ids": [5, 6]}])
    lines = shown(capsys, *options_of(tiny, "--calibrate", 1), "--data", data)
    assert lines[0] == f"{data}: 1 record (columns: input_ids), tokenised"
    assert lines[1] == "  1 document of at most 256 tokens, in 1 shard of at most 2,048 rows"
    assert lines[2] == "  2 rows, of which 1 counts"
    assert any(line.endswith(" cpu: 1 document, 2 rows of which 1 counts") for line in lines)


def test_seed_of_the_plan_is_used_for_its_draws(tiny, capsys):
    options = ["--scheme", "sample", "--num_draws", 9, "--seed", 7]
    (found,) = planned(capsys, *options_of(tiny, *options))["schemes"]
    assert found["scheme"] == "sample, num_draws 9, seed 7"
    entries = [
        planned(capsys, *options_of(tiny, "--scheme", "sample", "--seed", seed, "--calibrate", 24))["schemes"][0][
            "entries_per_row"
        ]
        for seed in (7, 8, 7)
    ]
    assert entries[0] == entries[2] != entries[1]


def test_help_explains_rows_per_s_and_calibrate(tiny, capsys):
    """The rows/s that a dump prints are those of all its actors, so the help tells the user to divide them."""
    assert cli.main(["plan", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "the rows/s that a dump printed, divided by its --num_actors" in text
    assert "only --calibrate needs its weights" in text


def test_plan_accepts_every_scheme_option():
    names = {name for options in OPTIONS.values() for name in options}
    assert names <= set(vars(parser().parse_args(["--data", "x"])))
