"""Acceptance from the cache, compared with float64 arithmetic on whole distributions, one document at a time."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import logitstore
from logitstore import LayerNotFoundError, Rows
from logitstore.format.schemes import Scheme
from logitstore.format.spec import TargetSpec
from logitstore.models.support import Support
from logitstore.rows import codec
from tests.helpers import stores
from tests.helpers.encoding import encode_rows
from tests.helpers.tiny import VOCAB_SIZE, dense_logprobs, make_model, topk_rows, write_store
from trainer.evaluation.from_cache import cached_acceptance, expected_tokens_per_call, read_documents, row_acceptance

DRAFTS = ("draft", "reference", "target")


@pytest.fixture(scope="module")
def models(tiny):
    return {name: AutoModelForCausalLM.from_pretrained(getattr(tiny, name)).eval() for name in DRAFTS}


@pytest.fixture(scope="module")
def store(tiny_store):
    return logitstore.open(tiny_store)


@pytest.fixture(scope="module")
def dense(store, models):
    """Logprobs of each model at the rows that count, float64 [N, V], computed one document at a time."""
    documents = [store[i] for i in range(store.num_documents)]
    return {
        name: np.concatenate([dense_logprobs(model, d.ids)[d.loss_mask] for d in documents])
        for name, model in models.items()
    }


def true_alpha(p, q):
    """Returns sum_v min(p_v, q_v) of each row, [N]."""
    return np.minimum(np.exp(p), np.exp(q)).sum(-1)


@pytest.mark.parametrize("name", DRAFTS)
def test_bounds_bracket_the_true_acceptance_rate(store, models, dense, name):
    p, q = dense["target"], dense[name]
    alpha = true_alpha(p, q).mean()
    found = cached_acceptance(models[name], store)
    assert (found.rows, found.documents) == (len(p), store.num_documents)
    assert found.alpha_lower <= alpha <= found.alpha_upper
    assert found.alpha_lower <= found.alpha_estimate <= found.alpha_upper
    assert found.argmax_agreement == (p.argmax(-1) == q.argmax(-1)).mean()


@pytest.mark.parametrize("name", DRAFTS)
def test_estimates_equal_those_of_the_truncated_distributions(store, models, dense, name):
    p, q = dense["target"], dense[name]
    k = store.spec.target.scheme.k
    order = np.argsort(-p, axis=-1, kind="stable")[:, :k]
    buckets = []
    for logprobs in (p, q):
        kept = np.exp(np.take_along_axis(logprobs, order, -1))
        buckets.append(np.concatenate([kept, 1 - kept.sum(-1, keepdims=True)], -1).clip(1e-12))
    found = cached_acceptance(models[name], store)
    # The estimate differs only by the coding error, up to 3% of a probability. Where p = q every error lowers it.
    assert found.alpha_estimate == pytest.approx(np.minimum(*buckets).sum(-1).mean(), abs=5e-3)
    kl = (buckets[0] * np.log(buckets[0] / buckets[1])).sum(-1).mean()
    assert found.forward_kl == pytest.approx(kl, abs=2e-3)


def oracle_rows(logprobs, k):
    """Returns the rows of N distributions. Their labels are arbitrary."""
    n = len(logprobs)
    return topk_rows(np.concatenate([logprobs, logprobs[:1]]), [0] * (n + 1), [1] * n + [0], k).slice(0, n)


def support(rows):
    return Support.of(rows.padded(np.arange(len(rows))), torch.device("cpu"))


@pytest.mark.parametrize("k", [1, 3, 16, VOCAB_SIZE])
@pytest.mark.parametrize("sharpness", [0.3, 1.0, 4.0])
def test_bounds_bracket_the_acceptance_of_every_row(k, sharpness):
    rng = np.random.default_rng(k)
    p, q = (torch.from_numpy(rng.normal(0, 2 * sharpness, (200, VOCAB_SIZE))) for _ in range(2))
    q = torch.cat([q[:100], p[100:] + 0.1 * q[100:]])  # the first half is from a bad draft, the second from a good one
    p, q = (x.log_softmax(-1).numpy() for x in (p, q))
    spec = TargetSpec(model=stores.MODEL, scheme=Scheme(k=k))
    arrays = encode_rows(oracle_rows(p, k), spec)
    parts = [codec.decode(arrays, spec), *codec.decode_bounds(arrays, spec.codebook)]
    found = row_acceptance(torch.from_numpy(q).float(), *(support(part) for part in parts))
    alpha = true_alpha(p, q)
    assert (found.alpha_lower.numpy() <= alpha).all()
    assert (alpha <= found.alpha_upper.numpy()).all()
    assert (found.argmax_agreement.numpy() == (p.argmax(-1) == q.argmax(-1))).all()
    if k == VOCAB_SIZE:  # no token is cut off, so only the coding error widens the bracket
        assert (found.alpha_upper - found.alpha_lower).max() < 0.05


def test_decoded_bounds_contain_the_encoded_values():
    rng = np.random.default_rng(0)
    logprobs = torch.from_numpy(rng.normal(0, 8, (300, VOCAB_SIZE))).log_softmax(-1).numpy()
    rows = oracle_rows(logprobs, 64)
    spec = TargetSpec(model=stores.MODEL, scheme=Scheme(k=64))
    assert rows.logprobs.min() < spec.codebook.table[-1]  # some values are beyond the range of the codebook
    least, most = codec.decode_bounds(encode_rows(rows, spec), spec.codebook)
    assert (least.logprobs <= rows.logprobs).all()
    assert (rows.logprobs <= most.logprobs).all()
    assert (least.tail_mass <= rows.tail_mass).all()
    assert (rows.tail_mass <= most.tail_mass).all()
    inside = rows.logprobs > -8
    assert (most.logprobs - least.logprobs)[inside].max() < 0.13  # the widest step above -8


@pytest.mark.parametrize("k", [16, VOCAB_SIZE])
def test_target_as_its_own_draft_is_always_accepted(tiny, models, tmp_path, k):
    tokenizer = AutoTokenizer.from_pretrained(tiny.tokenizer)
    documents = [(np.arange(3, 43) * (i + 1) % 500, [0] * 9 + [1] * 30 + [0]) for i in range(4)]
    url = write_store(str(tmp_path / "s"), documents, models["target"], tokenizer, k=k)
    found = cached_acceptance(models["target"], logitstore.open(url))
    assert found.argmax_agreement == 1.0
    assert found.alpha_upper == 1.0
    assert found.alpha_estimate >= 0.99
    assert found.forward_kl == pytest.approx(0.0, abs=1e-3)


def test_batch_size_changes_no_figure_and_max_documents_limits_the_rows(store, models, dense):
    whole = dataclasses.asdict(cached_acceptance(models["draft"], store))
    small = dataclasses.asdict(cached_acceptance(models["draft"], store, batch_tokens=1))
    assert small == pytest.approx(whole, abs=1e-6)
    done = []
    first = cached_acceptance(models["draft"], store, max_documents=9, progress=done.append)
    num_rows = sum(int(store[i].loss_mask.sum()) for i in range(9))
    assert (first.documents, sum(done), first.rows) == (9, 9, num_rows)
    p, q = (dense[name][:num_rows].argmax(-1) for name in ("target", "draft"))
    assert first.argmax_agreement == (p == q).mean()


def test_chosen_documents_equal_those_of_the_shard(store):
    whole = read_documents(store, 0)
    last = len(whole.shard) - 1
    some = whole.chosen(np.array([last, 1]))
    assert some.nbytes < whole.nbytes
    assert len(some.shard) == 2
    for place, number in enumerate((last, 1)):
        found, document = some.shard.document(place), whole.shard.document(number)
        assert found.ids.tolist() == document.ids.tolist()
        assert found.loss_mask.tolist() == document.loss_mask.tolist()
        start, stop = (int(some.shard.starts[place + i]) for i in (0, 1))
        spans = (slice(start, stop), slice(*map(int, whole.shard.starts[number : number + 2])))
        for ours, theirs in zip((some.shard.rows, *some.bounds), (whole.shard.rows, *whole.bounds), strict=True):
            mine, yours = (rows.slice(span.start, span.stop) for rows, span in zip((ours, theirs), spans, strict=True))
            assert np.array_equal(mine.logprobs, yours.logprobs)
            assert np.array_equal(mine.token_ids, yours.token_ids)
            assert np.array_equal(mine.tail_mass, yours.tail_mass, equal_nan=True)


@pytest.mark.parametrize("scheme", ["topk", "sample", "hybrid"])
def test_argmax_known_counts_rows_whose_likeliest_token_is_certain(measured, models, scheme):
    """In those rows, the likeliest kept token is the likeliest token of the whole distribution."""
    store = logitstore.open(measured[scheme])
    found = cached_acceptance(models["draft"], store)
    right, rows, spec = [], 0, store.spec.target
    for shard in range(store.num_shards):
        arrays = store.reader.read_arrays("target", shard)
        parts = [codec.decode(arrays, spec), *codec.decode_bounds(arrays, spec.codebook)]
        read = store.read_shard(shard, layers=())
        p = np.concatenate([dense_logprobs(models["target"], read.document(i).ids) for i in range(len(read))])
        for i in np.flatnonzero(read.loss_mask):
            row, least, most = (part.slice(i, i + 1) for part in parts)
            rows, place = rows + 1, row.logprobs.argmax()
            is_met = np.exp(least.logprobs[place]) >= min(most.tail_mass[0], spec.step if scheme == "hybrid" else 1.0)
            if scheme == "topk" or (is_met and (row.logprobs == row.logprobs.max()).sum() == 1):
                right.append(row.token_ids[place] == p[i].argmax())
    assert found.argmax_known == pytest.approx(len(right) / rows, abs=1e-3)
    assert (found.argmax_known == 1.0) == (scheme == "topk")
    assert all(right)
    assert len(right) > 20


def test_training_mode_is_kept(store, models):
    draft = models["reference"].train()
    cached_acceptance(draft, store, max_documents=1)
    assert draft.training
    draft.eval()


@pytest.mark.parametrize(("alpha", "gamma"), [(0.0, 5), (0.6, 1), (0.9, 5)])
def test_expected_tokens_per_call_equals_the_closed_form(alpha, gamma):
    assert expected_tokens_per_call(alpha, gamma) == pytest.approx((1 - alpha ** (gamma + 1)) / (1 - alpha))
    assert expected_tokens_per_call(1.0, gamma) == gamma + 1


def test_invalid_arguments_are_refused(tiny, store, models, tmp_path):
    with pytest.raises(ValueError, match="batch_tokens=0"):
        cached_acceptance(models["draft"], store, batch_tokens=0)
    with pytest.raises(ValueError, match="max_documents=0"):
        cached_acceptance(models["draft"], store, max_documents=0)
    small = make_model(tmp_path / "small", tiny.tokenizer, hidden=16, layers=1, vocab_size=500)
    with pytest.raises(ValueError, match="vocab_size=500"):
        cached_acceptance(AutoModelForCausalLM.from_pretrained(small), store)


def test_store_without_target_rows_is_refused(tiny_store, models, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(tiny_store, copy)
    shutil.rmtree(copy / "target")
    with pytest.raises(LayerNotFoundError, match="target layer"):
        cached_acceptance(models["draft"], logitstore.open(copy))


def test_bounds_keep_the_order_of_rows_and_entries():
    rows = Rows(
        counts=np.array([2, 0, 1]), token_ids=np.array([3, 7, 5], np.uint32),
        logprobs=np.log(np.array([0.6, 0.3, 0.9], np.float32)), tail_mass=np.array([0.1, np.nan, 0.1], np.float32),
        weights=None, label_logprob=np.full(3, np.nan, np.float32), entropy=np.full(3, np.nan, np.float32),
    )  # fmt: skip
    spec = TargetSpec(model=stores.MODEL, scheme=Scheme(k=2))
    for bound in codec.decode_bounds(encode_rows(rows, spec), spec.codebook):
        assert bound.counts.tolist() == [2, 0, 1]
        assert bound.token_ids.tolist() == [3, 7, 5]
        assert np.isnan(bound.tail_mass[1])
