"""The measurements of `logitstore plan --calibrate`: documents, models, and the range of the results."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from logitstore.commands import main as cli
from logitstore.dump.planning import survey, trial_run
from logitstore.format.schemes import Scheme
from logitstore.format.spec import ModelSpec, TargetSpec
from logitstore.models.split_lm import SplitLM
from tests.helpers.plans import options_of, planned
from tests.helpers.tiny import PADDED_VOCAB_SIZE, VOCAB_SIZE, write_jsonl

pytestmark = pytest.mark.usefixtures("datasets_cache")


@pytest.mark.parametrize("place", [0, 59])  # records are drawn at random: one of these two is not drawn first
def test_records_without_documents_are_not_used_for_calibration(tiny, tmp_path, capsys, place):
    records = [{"input_ids": [5, 6, 7, 8], "loss_mask": [0, 0, 0, 0]}] * 60
    records[place] = {"input_ids": [5, 6, 7, 8], "loss_mask": [0, 0, 1, 1]}
    data = write_jsonl(tmp_path / "one.jsonl", records)
    facts = planned(capsys, *options_of(tiny, "--calibrate", 1), "--data", data)
    assert facts["calibrated"].endswith(": 1 document, 4 rows of which 2 count")


BAD = {"target": 400, "reference": 401}
"""The token for which each model of `broken` returns NaN."""


@pytest.fixture(scope="module")
def broken(tiny, tmp_path_factory):
    """Folder of a target and a reference that return NaN from one token on."""
    folder = tmp_path_factory.mktemp("broken")
    for name, token in BAD.items():
        model = AutoModelForCausalLM.from_pretrained(getattr(tiny, name))
        with torch.no_grad():
            model.get_input_embeddings().weight[token] = float("nan")
        model.save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(tiny.tokenizer).save_pretrained(folder / name)
    return folder


class Clock:
    """A clock that advances one second at each reading."""

    now = 0

    def perf_counter(self):
        self.now += 1
        return self.now


def calibrated(capsys, monkeypatch, broken, documents, *options):
    """Returns the text and the scheme of a plan calibrated with all documents, where each shard takes one second."""
    data = write_jsonl(broken / "data.jsonl", [{"input_ids": ids} for ids in documents])
    monkeypatch.setattr(trial_run, "time", Clock())
    options = ["--scheme", "nucleus", "--calibrate", len(documents), *options]
    facts = planned(capsys, "--data", data, "--target", broken / "target", "--max_length", 64, *options)
    (found,) = facts["schemes"]
    return facts["calibrated"].partition(": ")[2], found


GOOD = [[i, *range(10, 10 + 4 * i)] for i in range(2, 6)]
ROWS, COUNTED = sum(map(len, GOOD)), sum(len(ids) - 1 for ids in GOOD)


@pytest.mark.parametrize("place", range(len(GOOD) + 1))  # one of these is the place of the document drawn first
def test_document_that_the_target_fails_with_is_left_out_of_the_plan(capsys, monkeypatch, broken, place):
    documents = [*GOOD[:place], [3, BAD["target"], 4], *GOOD[place:]]
    text, found = calibrated(capsys, monkeypatch, broken, documents)
    left_out = "1 document left out because a model fails on them"
    assert text == f"{len(GOOD)} documents, {ROWS} rows of which {COUNTED} count; {left_out}"
    assert found["rows_per_s"] == ROWS
    _, without = calibrated(capsys, monkeypatch, broken, GOOD)
    assert found["entries_per_row"] == pytest.approx(without["entries_per_row"])


@pytest.mark.parametrize("shard_rows", [64, 4096], ids=["shards of one document", "one shard"])
def test_documents_that_models_fail_with_are_left_out_of_shards_of_any_size(capsys, monkeypatch, broken, shard_rows):
    long = [[*ids, *range(10, 74 - len(ids))] for ids in GOOD]
    documents = [*long, [3, BAD["target"], *range(10, 72)], [3, BAD["reference"], *range(10, 72)]]
    options = ["--reference", f"ref={broken / 'reference'}", "--shard_rows", shard_rows]
    text, found = calibrated(capsys, monkeypatch, broken, documents, *options)
    left_out = "2 documents left out because a model fails on them"
    assert text == f"{len(long)} documents, {64 * len(long)} rows of which {63 * len(long)} count; {left_out}"
    assert found["rows_per_s"] == (64 if shard_rows == 64 else 64 * len(long))


def test_cost_of_a_reference_comes_from_the_rows_that_it_scores(tiny, capsys, monkeypatch, broken):
    """A reference that fails with half of the documents takes the same bytes per row as one that scores all."""
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
def test_calibration_without_a_document_that_all_models_score_is_refused(
    tiny, tmp_path, capsys, broken, documents, options, reason
):
    data = write_jsonl(tmp_path / "bad.jsonl", [{"input_ids": ids} for ids in documents])
    target = tiny.target if "swapped" in options else broken / "target"
    folders = {"reference": broken / "reference", "swapped": broken / "target"}
    references = [part for name in options for part in ("--reference", f"{name}={folders[name]}")]
    argv = ["plan", *options_of(tiny, "--calibrate", 9), *references, "--data", data, "--target", target]
    assert cli.main(list(map(str, argv))) == 2
    (line,) = capsys.readouterr().err.splitlines()
    start = f"error: calibrate needs a document that all models can score, got none among {len(documents)} ("
    assert line.startswith(start + reason)
    assert "model must give finite numbers, got " in line
    assert line.endswith("; check that the models run, or give a larger --calibrate")


def test_slow_first_call_of_each_model_is_not_timed(tiny, monkeypatch):
    """This holds even if all warm-up documents fail. The clock jumps only at the first forward pass of each model."""
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
    found = trial_run.calibrate(target, references, shards, spec, 4096, 1024, records=range(len(documents)), share=1.0)
    assert clock.now >= 3000
    assert found.cost.rows_per_s == found.rows == ROWS


@pytest.mark.parametrize("scheme", ["topk", "nucleus"])
def test_range_of_a_partial_calibration_contains_the_full_one(tiny, capsys, scheme):
    costs = ("entries_per_row", "target_bytes_per_counted_row", "bytes")
    base = options_of(tiny, "--scheme", scheme, "--k", 400, *(["--mass", 0.7] if scheme == "nucleus" else []))
    (whole,) = planned(capsys, *base, "--calibrate", 24)["schemes"]
    assert all(whole[cost][0] == whole[cost][1] for cost in costs)
    facts = planned(capsys, *base, "--calibrate", 8)
    note = "; ranges of entries and bytes: two standard errors to either side, from 8 records"
    assert facts["calibrated"].endswith(note)
    (found,) = facts["schemes"]
    for cost in costs:
        assert found[cost][0] <= whole[cost][0] <= found[cost][1] < 1.2 * whole[cost][0]
    assert found["bytes"][0] < found["bytes"][1]
    assert (found["entries_per_row"][0] == found["entries_per_row"][1]) == (scheme == "topk")


def test_calibration_with_one_record_states_that_no_range_is_known(tiny, capsys):
    facts = planned(capsys, *options_of(tiny, "--calibrate", 1, "--scheme", "topk"))
    assert facts["calibrated"].endswith("; only one record was measured, so the variation between records is unknown")
    (found,) = facts["schemes"]
    assert found["bytes"][0] == found["bytes"][1]


@pytest.mark.parametrize(("num", "share"), [(8, 0.001), (32, 0.5)])
def test_range_of_a_ratio_is_two_standard_errors_to_either_side(num, share):
    """Compared with the spread of 2,000 samples drawn without replacement from a population; within 15%."""
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
