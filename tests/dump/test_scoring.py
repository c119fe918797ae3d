"""The target's rows and the losses of models, compared with a dense float64 oracle that runs one document at a time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import logitstore
from logitstore.dump.scoring.score import score_losses, score_target
from logitstore.format.schemes import Scheme
from logitstore.models.probes import check_halves
from logitstore.models.split_lm import SplitLM
from logitstore.rows import codec
from logitstore.rows.batches import batches
from tests.helpers.stores import max_errors
from tests.helpers.tiny import PADDED_VOCAB_SIZE, VOCAB_SIZE, dense_logprobs, make_model, oracle_losses


@pytest.fixture(scope="module")
def target(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny.target).eval()


@pytest.fixture(scope="module")
def store(tiny_store):
    return logitstore.open(tiny_store)


@pytest.fixture(scope="module")
def dense(store, target):
    """Float64 logprobs [R, V] of shard 0, computed one document at a time."""
    shard = store.shard(0)
    return np.concatenate([dense_logprobs(target, shard.document(i).ids) for i in range(len(shard))])


def score(target, store, scheme, batch_tokens=700):
    spec = replace(store.spec.target, scheme=scheme)
    shard = store.shard(0)
    scored = score_target(SplitLM(target, VOCAB_SIZE), shard, spec, batch_tokens=batch_tokens)
    assert scored.set_aside == {}
    arrays = scored.arrays
    return shard, arrays, codec.decode(arrays, spec), spec.codebook


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(k=1),
        Scheme(k=16),
        Scheme(k=VOCAB_SIZE),
        Scheme(name="nucleus", k=64, mass=0.9, k_min=4),
        Scheme(name="nucleus", k=8, mass=0.5, k_min=1),
    ],
    ids=str,
)
def test_rows_equal_the_dense_oracle(target, store, dense, scheme):
    shard, arrays, rows, codebook = score(target, store, scheme)
    label_of = np.append(shard.ids[1:], 0)
    for i in np.flatnonzero(shard.loss_mask):
        row, p = rows.slice(i, i + 1), np.exp(dense[i])
        order = np.argsort(-dense[i], kind="stable")
        expected = scheme.k
        if scheme.name == "nucleus":
            reached = int(np.searchsorted(np.cumsum(p[order]), scheme.mass)) + 1
            expected = min(max(reached, scheme.k_min), scheme.k)
        # In float32 there may be a tie, or the mass may be reached earlier, than in float64.
        assert abs(int(row.counts[0]) - expected) <= (scheme.name == "nucleus")
        likeliest = np.sort(dense[i, row.token_ids])[::-1]
        np.testing.assert_allclose(likeliest, dense[i, order[: row.counts[0]]], atol=1e-5)
        assert (np.diff(row.token_ids.astype(int)) > 0).all()
        raw = codebook.table[arrays["logprobs"][rows.offsets[i] : rows.offsets[i + 1]]]
        true = np.maximum(dense[i, row.token_ids], codebook.table[-1])
        step = max_errors(codebook)[arrays["logprobs"][rows.offsets[i] : rows.offsets[i + 1]]]
        # An entry that would share the code of the likeliest entry gets the next code.
        assert (np.abs(raw - true) <= np.where(raw == np.sort(raw)[-2:][0], 3, 1) * step + 1e-5).all()
        assert dense[i, row.token_ids[row.logprobs.argmax()]] >= dense[i].max() - 1e-5
        kept_mass = np.delete(p, row.token_ids).sum()
        np.testing.assert_allclose(row.tail_mass[0], kept_mass, rtol=0.05, atol=1e-12)
        np.testing.assert_allclose(row.label_logprob[0], dense[i, label_of[i]], rtol=2**-7, atol=1e-5)
        np.testing.assert_allclose(row.entropy[0], -(p * dense[i]).sum(), rtol=2**-7, atol=1e-5)
        assert abs(np.exp(row.logprobs.astype(float)).sum() + row.tail_mass[0] - 1) < 1e-5


def test_rows_outside_the_loss_mask_have_no_values(target, store):
    shard, arrays, rows, _ = score(target, store, Scheme(k=16))
    masked = ~shard.loss_mask
    assert masked.sum() > 100
    assert (rows.counts[masked] == 0).all()
    for name in ("tail", "label_logprob", "entropy"):
        assert np.isnan(arrays[name][masked]).all()
        assert np.isfinite(arrays[name][~masked]).all()


def test_padding_tokens_do_not_affect_real_ones(target, store):
    """Rows scored in one wide padded batch equal those scored one document at a time."""
    _, together, _, _ = score(target, store, Scheme(k=16), batch_tokens=10**6)
    _, alone, _, _ = score(target, store, Scheme(k=16), batch_tokens=1)
    assert (together["gaps"] == alone["gaps"]).mean() > 0.999  # tied entries may be swapped
    for name in ("tail", "label_logprob", "entropy"):
        np.testing.assert_allclose(together[name], alone[name], rtol=2**-11, atol=1e-5)


def test_padding_values_do_not_matter(target, store):
    batch = next(batches(store.shard(0), 10**6))
    lm = SplitLM(target, VOCAB_SIZE)
    real = np.zeros(batch.ids.shape, dtype=bool)
    lengths = np.sort(store.shard(0).lengths)[::-1]
    for row, length in zip(real, lengths, strict=True):
        row[:length] = True
    junk = np.where(real, batch.ids, 77)
    assert (junk != batch.ids).any()
    with torch.no_grad():
        first, second = (lm.hidden(torch.from_numpy(ids)) for ids in (batch.ids, junk))
    assert torch.equal(first[torch.from_numpy(real)], second[torch.from_numpy(real)])


def test_losses_equal_the_dense_oracle(tiny, store):
    reference = AutoModelForCausalLM.from_pretrained(tiny.reference).eval()
    shard = store.shard(0)
    found = score_losses(SplitLM(reference, VOCAB_SIZE), shard, shard.rows, batch_tokens=700).arrays
    dense = np.concatenate([dense_logprobs(reference, shard.document(i).ids) for i in range(len(shard))])
    ce, label = oracle_losses(shard.rows, dense, shard.ids)
    np.testing.assert_allclose(found["ce"], ce, rtol=2**-7, atol=2e-5)
    np.testing.assert_allclose(found["label_logprob"], label, rtol=2**-7, atol=2e-5)
    assert np.isnan(found["ce"][~shard.loss_mask]).all()


def test_loss_gap_between_a_model_and_the_target_is_a_kl(tiny, store, target):
    """CE(p, r) - CE(p, p) is a KL on the support, so it is never negative except for the rounding of stored values."""
    shard = store.shard(0)
    own = score_losses(SplitLM(target, VOCAB_SIZE), shard, shard.rows, batch_tokens=700).arrays["ce"]
    gap = shard.losses["reference"] - own
    assert np.nanmin(gap) > -2e-3
    assert np.nanmean(gap) > 0.1


def test_logits_beyond_the_true_vocabulary_are_ignored(target, store):
    """Padding rows of the embedding with much larger logits than any token change nothing."""
    before = score(target, store, Scheme(k=16))[1]
    head = target.get_output_embeddings().weight
    kept = head[VOCAB_SIZE:].detach().clone()
    assert len(kept) == PADDED_VOCAB_SIZE - VOCAB_SIZE
    try:
        with torch.no_grad():
            head[VOCAB_SIZE:] = 100 * head[:1]
        after = score(target, store, Scheme(k=16))[1]
    finally:
        with torch.no_grad():
            head[VOCAB_SIZE:] = kept
    for name, values in before.items():
        np.testing.assert_array_equal(values, after[name])


def test_batches_cover_each_counted_row_once(store):
    shard = store.shard(0)
    seen = np.concatenate([batch.rows for batch in batches(shard, 300)])
    assert sorted(seen) == np.flatnonzero(shard.loss_mask).tolist()
    for batch in batches(shard, 300):
        assert batch.ids.size <= 300 or len(batch.ids) == 1
        np.testing.assert_array_equal(batch.ids.reshape(-1)[batch.places], shard.ids[batch.rows])
        np.testing.assert_array_equal(batch.labels, shard.ids[batch.rows + 1])


def test_split_models_give_the_logits_of_the_whole_model(tmp_path, tiny, target):
    check_halves(SplitLM(target, VOCAB_SIZE))
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB_SIZE, n_positions=64, n_embd=32, n_layer=1, n_head=2)
    check_halves(SplitLM(GPT2LMHeadModel(config).eval(), VOCAB_SIZE))


def test_model_that_changes_the_logits_of_its_head_is_refused(tmp_path, tiny):
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "m", tiny.tokenizer, hidden=16, layers=1))
    forward = model.forward

    def doubled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * 2 + 1
        return output

    model.forward = doubled
    with pytest.raises(ValueError, match=r"LlamaForCausalLM\), whose logits differ by up to"):
        check_halves(SplitLM(model, VOCAB_SIZE))
