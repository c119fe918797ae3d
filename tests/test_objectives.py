"""Objectives, selections and the chunked head against dense float64 arithmetic."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import VOCAB_SIZE, dense_logprobs, oracle_losses
from torch import nn

import logitstore
from logitstore.causal_lm import SplitLM, load_model
from logitstore.support import Support, on_support
from trainer import OBJECTIVES, SELECTIONS, DocumentDataset, DraftModule, collate
from trainer.head import row_losses, selected_losses
from trainer.objectives import forward_kl
from trainer.selection import Candidates


def random_rows(num_rows, vocab_size, k, seed=0):
    """A target's rows truncated to its k likeliest tokens, and a draft's logits; float64."""
    generator = torch.Generator().manual_seed(seed)
    p = (3 * torch.randn(num_rows, vocab_size, generator=generator, dtype=torch.float64)).softmax(-1)
    logits = 2 * torch.randn(num_rows, vocab_size, generator=generator, dtype=torch.float64)
    probs, token_ids = p.topk(k)
    tail = (1 - probs.sum(-1)).clamp_min(0) if k < vocab_size else torch.zeros(num_rows, dtype=torch.float64)
    return Support(token_ids=token_ids, probs=probs, tail=tail), logits


def dense_forward_kl(support, logits):
    """By the definition, bucket by bucket, in float64: the probabilities of one row at a time."""
    losses = []
    for i in range(len(support)):
        q = logits[i].softmax(-1)
        used = support.probs[i] > 0
        p_kept, q_kept = support.probs[i][used], q[support.token_ids[i][used]]
        loss = (p_kept * (p_kept / q_kept).log()).sum()
        if support.tail[i] > 0:
            others = torch.ones(len(q), dtype=torch.bool)
            others[support.token_ids[i][used]] = False
            loss = loss + support.tail[i] * (support.tail[i] / q[others].sum()).log()
        losses.append(loss)
    return torch.stack(losses)


@pytest.mark.parametrize("k", [1, 5, 40], ids=["one entry", "with a tail", "whole vocabulary, no tail"])
def test_forward_kl_and_its_gradient_equal_the_dense_ones(k):
    support, logits = random_rows(30, 40, k)
    expected_of, found_of = logits.clone().requires_grad_(), logits.float().requires_grad_()
    expected = dense_forward_kl(support, expected_of)
    single = Support(token_ids=support.token_ids, probs=support.probs.float(), tail=support.tail.float())
    found = forward_kl(single, *on_support(found_of.log_softmax(-1), single))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    expected.sum().backward()
    found.sum().backward()
    torch.testing.assert_close(found_of.grad.double(), expected_of.grad, rtol=1e-3, atol=2e-5)


def test_forward_kl_of_a_draft_equal_to_the_target_is_zero_with_zero_gradient():
    support, _ = random_rows(20, 40, 6)
    p = random_rows(20, 40, 40)[0]
    logits = torch.zeros(20, 40, dtype=torch.float64).scatter(1, p.token_ids, p.probs.log()).requires_grad_()
    loss = forward_kl(support, *on_support(logits.log_softmax(-1), support))
    loss.sum().backward()
    assert loss.abs().max() < 1e-12
    assert logits.grad.abs().max() < 1e-12


def test_padding_of_the_entries_changes_nothing():
    support, logits = random_rows(10, 40, 4)
    zeros = torch.zeros(10, 3)
    wider = Support(
        token_ids=torch.cat([support.token_ids, zeros.long()], 1),
        probs=torch.cat([support.probs, zeros], 1),
        tail=support.tail,
    )
    logprobs = logits.log_softmax(-1)
    torch.testing.assert_close(forward_kl(wider, *on_support(logprobs, wider)), dense_forward_kl(support, logits))


def candidates(draft_ce=None, reference_ce=None, *, num_rows=0, seed=0):
    return Candidates(
        num_rows=num_rows if draft_ce is None else len(draft_ce),
        device=torch.device("cpu"),
        draft_ce=draft_ce,
        reference_ce=reference_ce,
        generator=torch.Generator().manual_seed(seed),
    )


def test_adaspec_keeps_the_rows_whose_gap_reaches_the_quantile():
    rng = np.random.default_rng(0)
    q, r = rng.gamma(2, 1, 101), rng.gamma(2, 1, 101)
    found = SELECTIONS["adaspec"].select(candidates(torch.tensor(q), torch.tensor(r)), 0.4)
    threshold = np.quantile(q - r, 0.6)
    assert found.kept.tolist() == (q - r >= threshold).tolist()
    assert float(found.threshold) == pytest.approx(threshold)
    assert int(found.kept.sum()) == 41


def test_equal_gaps_are_all_kept():
    ones = torch.ones(10)
    assert SELECTIONS["adaspec"].select(candidates(ones, ones), 0.4).kept.all()


def test_keep_of_one_keeps_every_row():
    gap = torch.randn(33, generator=torch.Generator().manual_seed(0))
    assert SELECTIONS["adaspec"].select(candidates(gap, torch.zeros(33)), 1.0).kept.all()


def test_random_keeps_the_fraction_and_repeats_with_its_seed():
    kept = [SELECTIONS["random"].select(candidates(num_rows=1001, seed=seed), 0.4).kept for seed in (3, 3, 4)]
    assert [int(k.sum()) for k in kept] == [401] * 3
    assert torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0], kept[2])


def test_all_keeps_all():
    assert SELECTIONS["all"].select(candidates(num_rows=7), 0.4).kept.tolist() == [True] * 7


def test_adaspec_without_a_reference_is_refused():
    with pytest.raises(ValueError, match="reference must be given for a selection by loss gap, got reference=None"):
        SELECTIONS["adaspec"].select(candidates(torch.ones(3)), 0.4)


class FewRows(SplitLM):
    """Makes its logits for 7 rows at a time, and remembers for how many it was asked."""

    rows_per_chunk = 7

    def logits(self, hidden):
        self.asked = [*getattr(self, "asked", []), len(hidden)]
        return super().logits(hidden)


@pytest.fixture(scope="module")
def batch(tiny, tiny_store):
    """Documents of the tiny store with the tiny draft, and the oracle's numbers for their masked rows."""
    store = logitstore.open(tiny_store)
    data = DocumentDataset(store, "reference")
    draft = load_model(
        tiny.draft, revision=None, dtype="float32", attn_implementation=None, trust_remote_code=False, device="cpu"
    )
    chosen = [3, 8, 9, 20]
    ce, kl = [], []
    for number in chosen:
        document = store[number]
        logprobs = dense_logprobs(draft, document.ids)
        loss = oracle_losses(document.rows, logprobs, document.ids)[0][document.loss_mask]
        probs, tail = np.exp(document.rows.logprobs.astype(float)), document.rows.tail_mass.astype(float)
        entropy = -np.add.reduceat(probs * np.log(probs), document.rows.offsets[:-1][document.rows.counts > 0])
        tail = tail[document.loss_mask]
        ce.append(loss)
        kl.append(loss - entropy + tail * np.log(tail))
    reference = [store.loss("reference")[number][store[number].loss_mask].astype(float) for number in chosen]
    return SimpleNamespace(
        draft=draft, inputs=collate([data[number] for number in chosen]),
        ce=np.concatenate(ce), kl=np.concatenate(kl), gap=np.concatenate(ce) - np.concatenate(reference),
    )  # fmt: skip


def module(batch, selection="all", keep=0.4, denominator="kept"):
    return DraftModule(
        batch.draft, vocab_size=VOCAB_SIZE, objective=OBJECTIVES["forward_kl"], selection=SELECTIONS[selection],
        keep=keep, denominator=denominator,
    )  # fmt: skip


def gradients(draft, loss):
    draft.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in draft.named_parameters()}


def test_the_loss_of_all_rows_is_the_mean_of_the_oracles(batch):
    outputs = module(batch)(**batch.inputs)
    assert outputs["loss"].item() == pytest.approx(batch.kl.mean(), rel=1e-4)
    assert outputs["kl"].item() == pytest.approx(batch.kl.sum(), rel=1e-4)


@pytest.mark.parametrize("keep", [0.4, 0.15])
@pytest.mark.parametrize("denominator", ["kept", "masked"])
def test_adaspec_selects_and_weighs_what_the_oracle_does(batch, keep, denominator):
    threshold = np.quantile(batch.gap, 1 - keep)
    # rows that float32 may put on either side of the threshold would make this comparison one of rounding
    assert np.sort(np.abs(batch.gap - threshold))[0] > 1e-5
    kept = batch.gap >= threshold
    divisor = kept.sum() if denominator == "kept" else len(kept)
    outputs = module(batch, "adaspec", keep, denominator)(**batch.inputs)
    assert outputs["loss"].item() == pytest.approx(batch.kl[kept].sum() / divisor, rel=1e-4)
    assert outputs["threshold"].item() == pytest.approx(threshold, abs=1e-5)
    assert outputs["denominator"].item() == divisor
    assert outputs["kl"].item() == pytest.approx(batch.kl.sum(), rel=1e-4)
    assert selected(batch, SplitLM(batch.draft, VOCAB_SIZE), "adaspec", keep).selected.kept.tolist() == kept.tolist()


def selected(batch, split, selection, keep=0.4):
    hidden = split.hidden(batch.inputs["input_ids"]).flatten(0, 1)[batch.inputs["rows"]]
    support = Support(**{name: batch.inputs[name] for name in ("token_ids", "probs", "tail")})
    return selected_losses(
        split, hidden, support, batch.inputs["labels"], batch.inputs["reference_ce"],
        objective=forward_kl, selection=SELECTIONS[selection], keep=keep, generator=torch.Generator().manual_seed(5),
    )  # fmt: skip


@pytest.mark.parametrize("selection", ["all", "random", "adaspec"])
def test_a_chunked_head_equals_a_whole_one(batch, selection):
    found = {}
    for kind in (SplitLM, FewRows):
        split = kind(batch.draft, VOCAB_SIZE)
        result = selected(batch, split, selection)
        found[kind] = (result, gradients(batch.draft, result.objective.mean()))
    (whole, dense), (chunked, sparse) = found.values()
    assert torch.equal(whole.selected.kept, chunked.selected.kept)
    torch.testing.assert_close(chunked.objective, whole.objective, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(chunked.known.label_nll, whole.known.label_nll, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("selection", ["all", "random", "adaspec"])
def test_logits_of_all_rows_never_exist_at_once(batch, selection):
    split = FewRows(batch.draft, VOCAB_SIZE)
    head = batch.draft.get_output_embeddings().weight.data_ptr()
    num_rows, saved = len(batch.inputs["rows"]), {}

    def remember(tensor):
        if tensor.shape and tensor.shape[-1] >= VOCAB_SIZE and tensor.data_ptr() != head:
            saved[tensor.data_ptr()] = len(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        result = selected(batch, split, selection)
    before = sum(split.asked)
    result.objective.mean().backward()
    assert max(split.asked) <= split.rows_per_chunk
    assert sum(saved.values()) <= split.rows_per_chunk
    # a pass to score if the selection asks for it, the forward pass, and again in the backward but for the last chunk
    kept = int(result.selected.kept.sum())
    scored = num_rows if selection == "adaspec" else 0
    assert before == scored + kept
    assert sum(split.asked) == scored + 2 * kept - (kept % split.rows_per_chunk or split.rows_per_chunk)


def test_label_nll_is_that_of_the_text(batch):
    hidden = SplitLM(batch.draft, VOCAB_SIZE).hidden(batch.inputs["input_ids"]).flatten(0, 1)[batch.inputs["rows"]]
    support = Support(**{name: batch.inputs[name] for name in ("token_ids", "probs", "tail")})
    found = row_losses(SplitLM(batch.draft, VOCAB_SIZE), hidden, support, batch.inputs["labels"], forward_kl)
    logits = batch.draft(input_ids=batch.inputs["input_ids"]).logits.flatten(0, 1)[batch.inputs["rows"], :VOCAB_SIZE]
    expected = nn.functional.cross_entropy(logits, batch.inputs["labels"], reduction="none")
    torch.testing.assert_close(found.label_nll, expected.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("selection", ["all", "random", "adaspec"])
def test_a_batch_without_rows_has_loss_zero_and_a_gradient_for_every_parameter(batch, selection):
    empty = {name: value if name == "input_ids" else value[:0] for name, value in batch.inputs.items()}
    outputs = module(batch, selection)(**empty)
    found = gradients(batch.draft, outputs["loss"])
    assert outputs["loss"].item() == 0.0
    assert all(not gradient.any() for gradient in found.values())
    assert all(torch.isfinite(value) for value in outputs.values())


def test_padding_rows_of_the_vocabulary_get_no_gradient(batch):
    found = gradients(batch.draft, module(batch)(**batch.inputs)["loss"])
    head = found["lm_head.weight"]
    assert head[:VOCAB_SIZE].any()
    assert not head[VOCAB_SIZE:].any()
