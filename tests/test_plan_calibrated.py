"""What `logitstore plan --calibrate` measures: which documents, with which models, and how far off it may be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import PADDED_VOCAB_SIZE, VOCAB_SIZE, write_jsonl
from plans import options_of, planned
from transformers import AutoModelForCausalLM, AutoTokenizer

from logitstore import cli
from logitstore.dump.planning import survey, trial_run
from logitstore.format.schemes import Scheme
from logitstore.format.spec import ModelSpec, TargetSpec
from logitstore.models.split_lm import SplitLM

pytestmark = pytest.mark.usefixtures("datasets_cache")


@pytest.mark.parametrize("place", [0, 59])  # records are drawn: one of the two is not the first
def test_records_without_documents_are_not_among_those_that_calibrate(tiny, tmp_path, capsys, place):
    records = [{"input_ids": [5, 6, 7, 8], "loss_mask": [0, 0, 0, 0]}] * 60
    records[place] = {"input_ids": [5, 6, 7, 8], "loss_mask": [0, 0, 1, 1]}
    data = write_jsonl(tmp_path / "one.jsonl", records)
    facts = planned(capsys, *options_of(tiny, "--calibrate", 1), "--data", data)
    assert facts["calibrated"].endswith(": 1 document, 4 rows of which 2 count")


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
    monkeypatch.setattr(trial_run, "time", Clock())
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
        ([[BAD["target"], *ids] for ids in GOOD], [], "target: model must score"),
        ([[BAD["reference"], *ids] for ids in GOOD], ["reference"], "reference reference: model must score"),
        ([[3, BAD["target"], 4], [3, BAD["reference"], 4]], ["reference"], "reference reference: model must score"),
        ([[BAD["reference"], 4], [BAD["target"], 4]], ["swapped", "reference"], "reference swapped: model must give"),
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
    assert line.startswith(start + reason)
    assert "model must give finite numbers, got " in line
    assert line.endswith("; see that the models run, or take more records with --calibrate")


def test_what_is_slow_once_is_timed_of_no_model(tiny, monkeypatch):
    """Nor where the first documents all fail: the clock jumps at the first pass of each model alone."""
    clock = Clock()
    monkeypatch.setattr(trial_run, "time", clock)

    def load(name):
        model = AutoModelForCausalLM.from_pretrained(name).eval()
        with torch.no_grad():
            model.get_input_embeddings().weight[BAD["target"]] = float("nan")

        def first_pass(*_):
            clock.now += 1000
            handle.remove()

        handle = model.get_decoder().register_forward_pre_hook(first_pass)
        return SplitLM(model, VOCAB_SIZE)

    target, *others = map(load, (tiny.target, tiny.reference, tiny.draft))
    references = dict(zip("ab", others, strict=True))
    bad = [[BAD["target"], 5]] * trial_run.WARM_UP_DOCUMENTS
    documents = [
        survey.Tokens(np.array(ids), np.arange(len(ids)) < len(ids) - 1, i) for i, ids in enumerate((*bad, *GOOD))
    ]
    model = ModelSpec(name="target", revision="", dtype="float32", padded_vocab_size=PADDED_VOCAB_SIZE)
    spec = TargetSpec(model=model, scheme=Scheme(k=4))
    shards = survey.in_shards(documents, 4096)
    found = trial_run.calibrate(
        target, references, shards, spec, 4096, 1024, records=range(len(documents)), share=1.0
    )
    assert clock.now >= 3000
    assert found.cost.rows_per_s == found.rows == ROWS


@pytest.mark.parametrize("scheme", ["topk", "nucleus"])
def test_a_calibration_of_some_records_gives_a_range_that_holds_that_of_all(tiny, capsys, scheme):
    costs = ("entries_per_row", "target_bytes_per_counted_row", "bytes")
    base = options_of(tiny, "--scheme", scheme, "--k", 400, *(["--mass", 0.7] if scheme == "nucleus" else []))
    (whole,) = planned(capsys, *base, "--calibrate", 24)["schemes"]
    assert all(whole[cost][0] == whole[cost][1] for cost in costs)
    facts = planned(capsys, *base, "--calibrate", 8)
    note = "; ranges of entries and bytes: two standard errors over 8 records to either side"
    assert facts["calibrated"].endswith(note)
    (found,) = facts["schemes"]
    for cost in costs:
        assert found[cost][0] <= whole[cost][0] <= found[cost][1] < 1.2 * whole[cost][0]
    assert found["bytes"][0] < found["bytes"][1]
    assert (found["entries_per_row"][0] == found["entries_per_row"][1]) == (scheme == "topk")


def test_a_calibration_of_one_record_says_that_it_knows_no_range(tiny, capsys):
    facts = planned(capsys, *options_of(tiny, "--calibrate", 1, "--scheme", "topk"))
    assert facts["calibrated"].endswith("; of one record alone: how much others differ is not known")
    (found,) = facts["schemes"]
    assert found["bytes"][0] == found["bytes"][1]


@pytest.mark.parametrize(("num", "share"), [(8, 0.001), (32, 0.5)])
def test_the_range_of_a_ratio_is_two_standard_errors_wide(num, share):
    """Against the spread over 2,000 samples of a population, drawn without replacement; within 15 %."""
    rng = np.random.default_rng(0)
    counted = rng.integers(10, 200, round(num / share)).astype(float)
    values = counted * rng.gamma(4.0, 5.0, len(counted))
    ratios, widths = [], []
    for _ in range(2000):
        drawn = rng.choice(len(counted), num, replace=False)
        ratio = values[drawn].sum() / counted[drawn].sum()
        found = trial_run.around(ratio, values[drawn], counted[drawn], share)
        assert trial_run.around(2 * ratio, values[drawn], counted[drawn], share).high == pytest.approx(2 * found.high)
        ratios.append(ratio)
        widths.append(((found.high - found.low) / 4) ** 2)
    assert np.mean(widths) ** 0.5 == pytest.approx(np.std(ratios), rel=0.15)
