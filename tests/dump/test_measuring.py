"""The fidelity that a dump measures, compared with a dense float64 oracle."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import logitstore
from logitstore import Rows
from logitstore.dump.scoring import measuring
from logitstore.dump.scoring.batch_runner import without
from logitstore.dump.scoring.score import score_again
from logitstore.dump.worker import ShardDumper
from logitstore.errors import DamagedShardError
from logitstore.inspection.measured import read_measured
from logitstore.models.loading import ModelSource
from logitstore.models.split_lm import SplitLM
from logitstore.rows.batches import batches
from logitstore.storage.storage import Storage
from tests.helpers.dumped import edit_record, record
from tests.helpers.measured import LAYERS, SCHEMES, dumper, emptied
from tests.helpers.tiny import VOCAB_SIZE, dense_logprobs, make_model


@pytest.fixture(scope="module")
def dense(tiny, tiny_store):
    """Float64 probabilities [R, V] of target and reference for each shard, computed one document at a time."""
    models = [AutoModelForCausalLM.from_pretrained(path).eval() for path in (tiny.target, tiny.reference)]
    shards = list(logitstore.open(tiny_store).shards(layers=("tokens",)))
    return [
        [np.exp(np.concatenate([dense_logprobs(m, shard.document(i).ids) for i in range(len(shard))])) for m in models]
        for shard in shards
    ]


def measured_rows(store, shard):
    return measuring.choose(store.read_shard(shard, layers=("tokens",)))


def stored_row(rows, i):
    """Returns the kept probabilities [V], the weights for training [V] and the tail of a row, as they are read."""
    row = rows.slice(i, i + 1)
    kept, weights = np.zeros(VOCAB_SIZE), np.zeros(VOCAB_SIZE)
    kept[row.token_ids] = np.exp(row.logprobs.astype(float))
    weights[row.token_ids] = kept[row.token_ids] if row.weights is None else row.weights
    return kept, weights, float(row.tail_mass[0])


def degrees(a, b):
    return np.degrees(np.arccos(a @ b / np.linalg.norm(a) / np.linalg.norm(b)))


def target_oracle(p, rows, i):
    kept, weights, tail = stored_row(rows, i)
    is_kept = kept > 0
    left = p[~is_kept].sum()
    return {
        "rows": 1,
        "mass": p[is_kept].sum(),
        "kl_tail": (p[~is_kept] * np.log(p[~is_kept] / (left / (~is_kept).sum()))).sum(),
        "kl_renormalised": -np.log(p[is_kept].sum()),
        "kl_codes": (p[is_kept] * np.log(p[is_kept] / kept[is_kept])).sum() + left * np.log(left / tail),
    } | ({} if rows.weights is None else {"tv_draws": np.abs(weights - p).sum() / 2})


def losses_oracle(p, q, rows, i):
    kept, weights, tail = stored_row(rows, i)
    is_kept = kept > 0
    q_tail = max(1 - q[is_kept].sum(), 1e-6)
    alpha = np.minimum(p, q).sum()
    if rows.weights is None:
        estimate = np.minimum(kept, q)[is_kept].sum() + min(tail, q_tail)
        found = q - kept - np.where(is_kept, 0, tail * q / q_tail)
    else:
        estimate = (weights[is_kept] * np.minimum(1, q[is_kept] / kept[is_kept])).sum()
        found = weights.sum() * q - weights
    sums = {"rows": 1, "alpha": alpha, "alpha_estimate": estimate, "alpha_error": abs(alpha - estimate)}
    return sums | {"angle_row": degrees(q - p, found)}, q - p, found


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_measurement_of_the_target_equals_the_dense_oracle(measured, dense, scheme):
    store = logitstore.open(measured[scheme])
    for shard in range(3):
        rows = store.read_shard(shard, layers=("target",)).rows
        expected = [target_oracle(dense[shard][0][i], rows, i) for i in measured_rows(store, shard)]
        found = store.reader.commit("target", shard).fidelity
        assert {name for name in found if not name.startswith("control")} == set(expected[0])
        for name in expected[0]:
            assert found[name] == pytest.approx(sum(row[name] for row in expected), rel=2e-4, abs=1e-6), name


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_measurement_of_the_losses_equals_the_dense_oracle(measured, dense, scheme):
    store = logitstore.open(measured[scheme])
    for shard in range(3):
        rows = store.read_shard(shard, layers=("target",)).rows
        p, q = dense[shard]
        expected, wanted, gradients = zip(
            *(losses_oracle(p[i], q[i], rows, i) for i in measured_rows(store, shard)), strict=True
        )
        found = store.reader.commit("losses/reference", shard).fidelity
        for name in expected[0]:
            assert found[name] == pytest.approx(sum(row[name] for row in expected), rel=2e-4), name
        assert found["angle_shard"] == pytest.approx(degrees(sum(wanted), sum(gradients)), rel=2e-4)
        assert found["shards"] == 1
        assert set(found) == {*expected[0], "angle_shard", "shards"}


def test_kl_codes_and_kl_tail_add_up_to_the_whole_divergence(measured, dense):
    """The KL from p to the stored row with an evenly spread tail equals kl_codes + kl_tail."""
    store = logitstore.open(measured["topk"])
    rows, p = store.read_shard(0, layers=("target",)).rows, dense[0][0]
    whole = 0.0
    for i in measured_rows(store, 0):
        kept, _, tail = stored_row(rows, i)
        model = np.where(kept > 0, kept, tail / (kept == 0).sum())
        whole += (p[i] * np.log(p[i] / model)).sum()
    found = store.reader.commit("target", 0).fidelity
    assert found["kl_codes"] + found["kl_tail"] == pytest.approx(whole, rel=1e-5)


def test_measured_rows_are_from_few_documents_and_repeatable(measured):
    store = logitstore.open(measured["topk"])
    shards = [store.read_shard(i, layers=("tokens",)) for i in range(3)]
    for shard in shards:
        rows = measuring.choose(shard)
        assert shard.loss_mask[rows].all()
        assert (np.diff(rows) > 0).all()
        owners = np.searchsorted(shard.starts, rows, side="right")
        assert len(set(owners)) == min(measuring.DOCUMENTS, len(shard))
        for owner in set(owners):
            counted = shard.document(owner - 1).loss_mask.sum()
            assert (owners == owner).sum() == min(measuring.ROWS, counted)
        np.testing.assert_array_equal(rows, measuring.choose(shard))
    assert measuring.choose(shards[0]).tolist() != measuring.choose(replace(shards[0], index=7)).tolist()
    single = without(shards[0], range(1, len(shards[0])))
    np.testing.assert_array_equal(
        measuring.choose(replace(single, loss_mask=single.loss_mask & (np.cumsum(single.loss_mask) <= 3))),
        np.flatnonzero(single.loss_mask)[:3],
    )
    assert len(measuring.choose(without(single, [0]))) == 0


def test_rows_of_long_documents_are_measured_in_proportion(measured):
    shard = logitstore.open(measured["topk"]).read_shard(0, layers=("tokens",))
    lengths = np.array([16] * 90 + [160] * 10)
    mask = np.ones(lengths.sum(), dtype=bool)
    made = replace(shard, ids=np.zeros(len(mask), np.uint32), loss_mask=mask, lengths=lengths)
    chosen = [measuring.choose(replace(made, index=i)) for i in range(300)]
    assert {len(rows) for rows in chosen} == {measuring.DOCUMENTS * measuring.ROWS}
    share = np.mean(np.concatenate(chosen) >= 90 * 16)
    assert abs(share - 1600 / 3040) < 0.06  # the standard error of 1,200 drawn documents is 0.014


@pytest.mark.parametrize("batch_tokens", [700, 100])
def test_another_actor_measures_the_same_values(measured, tiny, tiny_store, tmp_path, batch_tokens):
    """Equal batches give identical values; other batches differ by rounding only."""
    url = emptied(tiny_store, tmp_path / "cache.zarr", SCHEMES["hybrid"])
    found = dumper(url, tiny, batch_tokens=batch_tokens).dump(0, LAYERS)
    first = [logitstore.open(measured["hybrid"]).reader.commit(layer, 0) for layer in LAYERS]
    for new, old in zip(found, first, strict=True):
        assert batch_tokens != 700 or (new.name, new.fidelity) == (old.name, old.fidelity)
        for name, value in old.fidelity.items():
            assert new.fidelity[name] == pytest.approx(value, rel=1e-3, abs=1e-6), name


def test_control_measures_the_numerical_noise_of_the_target(tiny, tiny_store, tmp_path):
    target = make_model(tmp_path / "target", tiny.tokenizer, hidden=256, layers=2, seed=1, scale=0.1)
    means = {}
    for dtype in ("float32", "bfloat16"):
        url = emptied(tiny_store, tmp_path / f"{dtype}.zarr", SCHEMES["topk"])
        found = dumper(url, tiny, dtype=dtype, batch_tokens=9999, target=target)
        for shard in range(3):
            sums = found.dump(shard, ["target"])[0].fidelity
            assert 0 < sums["control_rows"] <= sums["rows"]
        means[dtype] = read_measured(logitstore.open(url), "target", range(3)).means()
    assert abs(means["float32"]["control_kl"]) < 1e-9
    assert means["float32"]["control_tv"] < 1e-5
    assert 1e-7 < means["bfloat16"]["control_kl"] < 1e-2
    assert 1e-5 < means["bfloat16"]["control_tv"] < 0.1


def test_control_runs_at_least_one_document_and_at_most_its_share(measured):
    shard = logitstore.open(measured["topk"]).read_shard(0, layers=("tokens",))
    rows = measuring.choose(shard)
    control = measuring.control_of(shard, rows)
    (batch,) = batches(control, 10**6)
    assert len(batch.ids) == 1
    assert set(batch.rows) <= set(rows)
    repeated = replace(
        shard, ids=np.tile(shard.ids, 200), loss_mask=np.tile(shard.loss_mask, 200), lengths=np.tile(shard.lengths, 200)
    )
    rows = measuring.choose(repeated)
    control = measuring.control_of(repeated, rows)
    np.testing.assert_array_equal(np.flatnonzero(control.loss_mask), rows)
    assert sum(batch.ids.size for batch in batches(control, 1)) <= len(repeated.ids) / measuring.CONTROL_SHARE


def test_documents_set_aside_are_not_measured(tiny, tiny_store, tmp_path):
    url = emptied(tiny_store, tmp_path / "cache.zarr", SCHEMES["nucleus"])
    shard = logitstore.open(url).read_shard(0, layers=("tokens",))
    rows = measuring.choose(shard)
    owners = np.searchsorted(shard.starts, rows, side="right") - 1
    chosen = [shard.document(i) for i in sorted(set(owners))]
    elsewhere = set(np.concatenate([d.ids for d in chosen[1:]]))
    token = next(int(t) for t in chosen[0].ids if t not in elsewhere)
    model = AutoModelForCausalLM.from_pretrained(tiny.target)
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = float("nan")
    model.save_pretrained(tmp_path / "target")
    lacking = dumper(url, tiny, target=str(tmp_path / "target")).dump(0, LAYERS)
    assert owners[0] in lacking[0].set_aside
    left = int((owners != owners[0]).sum())
    assert [commit.fidelity["rows"] for commit in lacking] == [left, left]
    # The document set aside is tried again, and then measured.
    mended = dumper(url, tiny).dump(0, LAYERS, retry=[lacking[0].name])
    assert [commit.fidelity["rows"] for commit in mended] == [len(rows), len(rows)]


def test_nothing_is_measured_without_rows(measured, tiny):
    store = logitstore.open(measured["topk"])
    shard = store.read_shard(0, layers=("target",))
    lm = SplitLM(AutoModelForCausalLM.from_pretrained(tiny.target).eval(), VOCAB_SIZE)
    exact = measuring.Exact.of(measuring.choose(shard), VOCAB_SIZE, lm.device)
    exact = measuring.without(exact, shard, range(len(shard)))
    again = score_again(lm, shard, exact.rows)
    assert measuring.measure_target(exact, again, shard.rows, store.spec.target) == {}
    assert measuring.measure_losses(exact, again, shard.rows) == {}
    measuring.check_budget({}, store.spec.target, 1e-9, 0)


def test_token_of_probability_zero_gives_finite_measurements(measured):
    store = logitstore.open(measured["hybrid"])
    spec, shard = store.spec.target, store.read_shard(0, layers=("target",))
    rows, (places, token) = shard.rows, (measuring.choose(shard)[:5], 501)
    logits = torch.randn(len(shard.ids), VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    logits[:, token] = -torch.inf
    exact, other = (measuring.Exact.of(places, VOCAB_SIZE, torch.device("cpu")) for _ in range(2))
    exact.keep(np.arange(len(shard.ids)), logits)
    other.keep(np.arange(len(shard.ids)), logits.flip(0))
    alike = rows_of_logits(logits[places], rows, places)
    lost = measuring.measure_target(exact, exact, only(alike, places), spec)
    for sums in (lost, measuring.measure_losses(exact, other, alike)):
        assert np.isfinite(list(sums.values())).all(), sums
        assert sums["rows"] == 5


def only(rows, places):
    """Returns the rows at some places."""
    return Rows.concatenate([rows.slice(i, i + 1) for i in places])


def rows_of_logits(logits, rows, places):
    """Returns rows with the same ids, and with the logprobs of other distributions at some places."""
    logprobs = rows.logprobs.copy()
    for place, row in zip(places, logits.log_softmax(-1).numpy(), strict=True):
        span = slice(rows.offsets[place], rows.offsets[place + 1])
        logprobs[span] = row[rows.token_ids[span]]
    return replace(rows, logprobs=np.maximum(logprobs, np.float32(-50)))


def test_losses_dumped_without_the_target_are_not_measured(measured, tiny, tmp_path):
    url = shutil.copytree(measured["topk"], tmp_path / "cache.zarr")
    shutil.rmtree(url / "commits/losses")
    later = ShardDumper(
        Storage(url), None, {"reference": ModelSource(name=tiny.reference)}, batch_tokens=700, device="cpu"
    )
    (commit,) = later.dump(0, ["losses/reference"])
    assert commit.fidelity == {}
    assert "fidelity" not in json.loads(record(url, "losses/reference", 0).read_text())
    assert logitstore.open(url).reader.commit("losses/reference", 0) == commit
    assert commit.name == logitstore.open(measured["topk"]).reader.commit("losses/reference", 0).name


@pytest.mark.parametrize(
    "found",
    [
        {"rows": -1}, {"rows": 0}, {"more": 1}, {"alpha": 0.5}, {"rows": True}, {"rows": 10**6}, {"mass": 1e300},
        {"mass": "1"}, {"mass": [1]}, {"mass": 10**400}, {"kl_tail": None}, {"control_rows": -1},
    ],
    ids=str,
)  # fmt: skip
def test_record_with_impossible_fidelity_is_damage(measured, tmp_path, found):
    url = shutil.copytree(measured["topk"], tmp_path / "cache.zarr")
    good = logitstore.open(url).reader.commit("target", 1).fidelity
    for values in (good | found, found, [1]):
        edit_record(record(url, "target", 1), fidelity=values)
        with pytest.raises(DamagedShardError, match="fidelity"):
            logitstore.open(url).reader.commit("target", 1)
    edit_record(record(url, "target", 1), fidelity=good)
    assert logitstore.open(url).reader.commit("target", 1).fidelity == good
    edit_record(record(url, "tokens", 1), fidelity={"rows": 1})
    with pytest.raises(DamagedShardError, match="malformed fidelity"):
        logitstore.open(url).reader.commit("tokens", 1)


def test_changed_fidelity_value_is_damage(measured, tmp_path):
    url = shutil.copytree(measured["topk"], tmp_path / "cache.zarr")
    path = record(url, "target", 1)
    values = json.loads(path.read_text())
    values["fidelity"]["kl_codes"] /= 2
    path.write_text(json.dumps(values))
    with pytest.raises(DamagedShardError, match="checksum"):
        logitstore.open(url).reader.commit("target", 1)
