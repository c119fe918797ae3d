"""Documents that a model fails with are set aside one by one; the others of the shard stay bit-identical."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import logitstore
from logitstore.dump.scoring.batch_runner import documents_of, without
from logitstore.dump.scoring.score import score_losses, score_target
from logitstore.format.schemes import Scheme
from logitstore.models.split_lm import SplitLM
from logitstore.rows import codec
from logitstore.rows.batches import batches
from tests.helpers.tiny import PADDED_VOCAB_SIZE, VOCAB_SIZE, dense_logprobs

TOGETHER, GROUPED, ALONE = 10**6, 700, 1
"""Tokens per batch: one batch for the whole shard, batches of several documents, one batch per document."""

PER_ENTRY = ("gaps", "logprobs", "draws")


@pytest.fixture
def target(tiny):
    """A target for each test, because tests change its weights."""
    return AutoModelForCausalLM.from_pretrained(tiny.target).eval()


@pytest.fixture
def reference(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny.reference).eval()


@pytest.fixture(scope="module")
def store(tiny_store):
    return logitstore.open(tiny_store)


@pytest.fixture(scope="module")
def shard(store):
    return store.shard(0)


@pytest.fixture(scope="module")
def rare(shard):
    """A token that occurs in exactly two documents of the shard, in both before the first row that counts."""
    documents = [shard.document(i) for i in range(len(shard))]
    prompts = [set(document.ids[: document.loss_mask.argmax()].tolist()) for document in documents]
    wholes = [set(document.ids.tolist()) for document in documents]
    return next(
        token
        for token in sorted(set().union(*prompts))
        if sum(token in ids for ids in prompts) == sum(token in ids for ids in wholes) == 2
    )


def holders(shard, condition):
    """Returns the documents with a token for which the condition is true."""
    return [i for i in range(len(shard)) if condition(shard.document(i).ids).any()]


def score(model, store, shard, batch_tokens, scheme=None):
    spec = replace(store.spec.target, scheme=scheme or store.spec.target.scheme)
    return score_target(SplitLM(model, VOCAB_SIZE), shard, spec, batch_tokens=batch_tokens)


def losses(model, shard, batch_tokens, rows=None):
    return score_losses(SplitLM(model, VOCAB_SIZE), shard, rows or shard.rows, batch_tokens=batch_tokens)


def document_bytes(shard, arrays, document):
    """Returns every stored byte of a document, by array."""
    start, stop = shard.starts[document], shard.starts[document + 1]
    ends = np.append(0, np.cumsum(arrays["counts"], dtype=np.int64)) if "counts" in arrays else None
    return {
        name: (values[ends[start] : ends[stop]] if name in PER_ENTRY else values[start:stop]).tobytes()
        for name, values in arrays.items()
    }


def blank_bytes(shard, arrays, document):
    """Returns the stored bytes of a document whose loss mask is 0 everywhere."""
    length = int(shard.lengths[document])
    blank = {"counts": np.zeros(length, np.uint16).tobytes(), "gaps": b"", "logprobs": b"", "draws": b""}
    return {name: blank.get(name, np.full(length, np.nan, np.float32).tobytes()) for name in arrays}


def check(shard, scored, expected, set_aside):
    """Checks that documents set aside are blank, and that the others have the bytes of `expected(document)`."""
    assert list(scored.set_aside) == set_aside
    for document in range(len(shard)):
        found = document_bytes(shard, scored.arrays, document)
        if document in set_aside:
            assert found == blank_bytes(shard, scored.arrays, document)
        else:
            assert found == document_bytes(shard, expected(document).arrays, document)
            assert np.isfinite(np.frombuffer(found.get("entropy", found.get("ce")), np.float32)).any()


def break_token(model, token):
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = float("nan")
    return model


def shorten(model, num_tokens):
    """Removes the last rows of the embedding table."""
    table = model.get_input_embeddings()
    table.weight = torch.nn.Parameter(table.weight[:num_tokens].detach().clone())
    return model


def fail_when(model, condition, error):
    """Makes the backbone raise an error at calls for which the condition is true. Returns the shapes of all calls."""
    shapes = []

    def hook(module, args, kwargs):
        shapes.append(tuple(kwargs["input_ids"].shape))
        if condition(shapes):
            raise error

    model.base_model.register_forward_pre_hook(hook, with_kwargs=True)
    return shapes


@pytest.mark.parametrize("batch_tokens", [TOGETHER, GROUPED, ALONE])
@pytest.mark.parametrize("scheme", [Scheme(k=16), Scheme(name="nucleus", k=32, mass=0.9, k_min=2)], ids=str)
def test_documents_with_nan_are_blanked_and_the_others_stay_identical(target, store, shard, rare, scheme, batch_tokens):
    healthy = score(target, store, shard, batch_tokens, scheme)
    break_token(target, rare)
    dense = [dense_logprobs(target, shard.document(i).ids)[shard.document(i).loss_mask] for i in range(len(shard))]
    wrong = [i for i, logprobs in enumerate(dense) if not np.isfinite(logprobs).all()]
    assert wrong == holders(shard, lambda ids: ids == rare)
    scored = score(target, store, shard, batch_tokens, scheme)
    check(shard, scored, lambda _: healthy, wrong)
    first = shard.document(wrong[0]).loss_mask.argmax()
    assert scored.set_aside[wrong[0]] == f"model must give finite numbers, got tail=nan at row {first}"
    rows = codec.decode(scored.arrays, store.spec.target)
    assert len(rows.token_ids) == rows.counts.sum() == healthy.arrays["counts"][without(shard, wrong).loss_mask].sum()


@pytest.mark.parametrize("batch_tokens", [TOGETHER, GROUPED])
def test_losses_with_nan_are_blanked_and_the_others_stay_identical(reference, shard, rare, batch_tokens):
    healthy = losses(reference, shard, batch_tokens)
    scored = losses(break_token(reference, rare), shard, batch_tokens)
    check(shard, scored, lambda _: healthy, holders(shard, lambda ids: ids == rare))
    assert all("must give finite numbers, got ce=nan at row" in reason for reason in scored.set_aside.values())


def test_probability_zero_is_allowed_for_labels_and_not_for_kept_entries(reference, target, store, shard):
    """A label with probability 0 has logprob -inf. A kept entry with probability 0 makes the cross entropy infinite."""
    first = score(target, store, shard, GROUPED, Scheme(k=1))
    rows = codec.decode(first.arrays, store.spec.target)
    labels = np.append(shard.ids[1:], 0)[shard.loss_mask]
    never_kept = np.setdiff1d(labels, rows.token_ids)[0]
    kept = np.unique(rows.token_ids)
    where = {token: np.unique(documents_of(shard, np.flatnonzero(shard.loss_mask)[rows.token_ids == token]))
             for token in kept.tolist()}  # fmt: skip
    entry = min(where, key=lambda token: (len(where[token]), token))
    assert len(where[entry]) < len(shard)
    head = reference.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(PADDED_VOCAB_SIZE))
    with torch.no_grad():
        head.bias[[int(never_kept), entry]] = -torch.inf
    scored = losses(reference, shard, GROUPED, rows)
    assert list(scored.set_aside) == where[entry].tolist()
    assert all("got ce=inf" in reason for reason in scored.set_aside.values())
    left = np.flatnonzero(without(shard, scored.set_aside).loss_mask)
    impossible = np.isin(shard.ids[left + 1], [never_kept, entry])
    assert impossible.any()
    np.testing.assert_array_equal(np.isneginf(scored.arrays["label_logprob"][left]), impossible)
    assert np.isfinite(scored.arrays["ce"][left]).all()


def test_tail_without_mass_is_valid(target, store, shard):
    scored = score(target, store, shard, GROUPED, Scheme(k=VOCAB_SIZE))
    assert scored.set_aside == {}
    assert np.isneginf(scored.arrays["tail"][shard.loss_mask]).all()


@pytest.mark.parametrize("batch_tokens", [TOGETHER, GROUPED, ALONE])
@pytest.mark.parametrize("what", ["target", "losses"])
def test_failing_batch_loses_only_the_documents_that_fail_alone(target, reference, store, shard, what, batch_tokens):
    """Documents from a failing batch get the bits of a run one by one; the others get those of the usual run."""

    def run(tokens):
        return score(target, store, shard, tokens) if what == "target" else losses(reference, shard, tokens)

    together, alone = run(batch_tokens), run(ALONE)
    limit = int(shard.ids.max())
    bad = holders(shard, lambda ids: ids >= limit)
    groups = [set(documents_of(shard, batch.rows).tolist()) for batch in batches(shard, batch_tokens)]
    touched = set().union(*(group for group in groups if group & set(bad)))
    assert len(touched) == {TOGETHER: len(shard), ALONE: len(bad)}.get(batch_tokens, len(touched))
    shorten(target if what == "target" else reference, limit)
    scored = run(batch_tokens)
    check(shard, scored, lambda document: alone if document in touched else together, bad)
    assert set(scored.set_aside.values()) == {"IndexError: index out of range in self"}
    again = run(batch_tokens)
    assert [document_bytes(shard, again.arrays, i) for i in range(len(shard))] == [
        document_bytes(shard, scored.arrays, i) for i in range(len(shard))
    ]
    assert again.set_aside == scored.set_aside


def test_document_longer_than_the_positions_does_not_affect_short_ones(store, shard):
    torch.manual_seed(0)
    positions = int(np.median(shard.lengths))
    config = GPT2Config(vocab_size=VOCAB_SIZE, n_positions=positions, n_embd=32, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(config).eval()
    scored = score(model, store, shard, TOGETHER)
    assert list(scored.set_aside) == np.flatnonzero(shard.lengths > positions).tolist()
    for i in np.flatnonzero(shard.lengths <= positions):
        document = shard.document(i)
        p = dense_logprobs(model, document.ids)[document.loss_mask]
        found = scored.arrays["entropy"][shard.starts[i] : shard.starts[i + 1]]
        np.testing.assert_allclose(found[document.loss_mask], -(np.exp(p) * p).sum(-1), rtol=2**-7, atol=1e-5)


def test_non_finite_values_and_errors_in_one_shard_keep_separate_reasons(target, store, shard, rare):
    limit = int(shard.ids.max())
    raising = holders(shard, lambda ids: ids >= limit)
    wrong = sorted({*holders(shard, lambda ids: ids == rare)} - {*raising})
    scored = score(shorten(break_token(target, rare), limit), store, shard, GROUPED)
    assert list(scored.set_aside) == sorted([*raising, *wrong])
    assert all(scored.set_aside[document].startswith("IndexError: ") for document in raising)
    assert all("finite numbers" in scored.set_aside[document] for document in wrong)


@pytest.mark.parametrize("call", [0, 1, 2])
@pytest.mark.parametrize("batch_tokens", [GROUPED, ALONE])
def test_temporary_error_changes_no_byte(target, store, shard, call, batch_tokens):
    """After a temporary lack of memory, the batch runs again in the same shape."""
    healthy = score(target, store, shard, batch_tokens)
    shapes = fail_when(target, lambda calls: len(calls) == call + 1, torch.OutOfMemoryError("CUDA out of memory."))
    check(shard, score(target, store, shard, batch_tokens), lambda _: healthy, [])
    assert shapes[-1] == shapes[call]


def test_batches_too_large_for_memory_run_one_document_at_a_time(target, store, shard, caplog):
    alone = score(target, store, shard, ALONE)
    room = int(np.sort(shard.lengths)[-2])
    error = torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {'9' * 300} GiB\nGPU 0 has a capacity of 1")
    shapes = fail_when(target, lambda calls: np.prod(calls[-1]) > room, error)
    scored = score(target, store, shard, GROUPED)
    longest = np.flatnonzero(shard.lengths > room).tolist()
    check(shard, scored, lambda _: alone, longest)
    assert len(scored.set_aside[longest[0]]) == 200
    assert scored.set_aside[longest[0]].startswith("OutOfMemoryError: CUDA out of memory. Tried to allocate 9")
    assert "documents of shard 0 are run one by one: OutOfMemoryError" in caplog.text
    assert all(rows == 1 for rows, tokens in shapes if rows * tokens <= room)


class Preempted(BaseException):
    """Stands for an exception that ends the process."""


@pytest.mark.parametrize(
    "error",
    [torch.AcceleratorError("CUDA error: device-side assert triggered"), MemoryError(), TypeError("x"), Preempted()],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("batch_tokens", [GROUPED, ALONE])
def test_errors_that_no_document_causes_are_raised(target, store, shard, error, batch_tokens):
    fail_when(target, lambda calls: len(calls) == 2, error)
    with pytest.raises(type(error)):
        score(target, store, shard, batch_tokens)


@pytest.mark.parametrize("batch_tokens", [GROUPED, ALONE])
def test_lost_device_is_detected_behind_another_error(target, store, shard, batch_tokens):
    """A matrix product reports a lost device as a plain RuntimeError; only the next call raises AcceleratorError."""
    last = len(list(batches(shard, batch_tokens)))
    fail_when(target, lambda calls: len(calls) == last, RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"))
    lost = torch.AcceleratorError("CUDA error: device-side assert triggered")
    fail_when(target, lambda calls: len(calls) > last - 1, lost)
    with pytest.raises(torch.AcceleratorError, match="device-side assert"):
        score(target, store, shard, batch_tokens)


@pytest.mark.parametrize("batch_tokens", [TOGETHER, ALONE])
def test_model_without_finite_values_for_any_document_is_refused(target, reference, store, shard, batch_tokens):
    for model in (target, reference):
        with torch.no_grad():
            model.get_output_embeddings().weight[3] = float("nan")
    message = (
        r"model must score at least one document of shard 0, got {} that all fail \(document 0: model must give finite "
    )
    message = message.format(len(shard))
    with pytest.raises(ValueError, match=message + r"numbers, got tail=nan at row \d+\); try --dtype float32$"):
        score(target, store, shard, batch_tokens)
    with pytest.raises(ValueError, match=message + r"numbers, got ce=nan at row \d+\); try --dtype float32$"):
        losses(reference, shard, batch_tokens)


@pytest.mark.parametrize("batch_tokens", [TOGETHER, ALONE])
def test_model_that_raises_for_every_document_is_refused(target, store, shard, batch_tokens):
    fail_when(target, lambda calls: True, ValueError("\n this model wants images \nand nothing else"))
    with pytest.raises(
        ValueError, match=r"document 0: ValueError: this model wants images\); check that it runs on one"
    ):
        score(target, store, shard, batch_tokens)


def test_document_that_raises_alone_is_tried_exactly_twice(target, store, shard):
    longest = int(shard.lengths.max())
    shapes = fail_when(target, lambda calls: calls[-1][1] == longest, AssertionError())
    assert set(score(target, store, shard, ALONE).set_aside.values()) == {"AssertionError"}
    assert len(shapes) == len(shard) + 1


def test_documents_without_rows_that_count_are_not_run(target, reference, store, shard):
    """So no model can fail with them, and no losses are computed for documents without rows of the target."""
    limit = int(shard.ids.max())
    bad = holders(shard, lambda ids: ids >= limit)
    masked = without(shard, bad)
    assert not masked.loss_mask[np.isin(documents_of(shard, np.arange(len(shard.ids))), bad)].any()
    healthy = score(target, store, masked, GROUPED), losses(reference, masked, GROUPED)
    shorten(target, limit)
    shorten(reference, limit)
    for expected, scored in zip(
        healthy, (score(target, store, masked, GROUPED), losses(reference, masked, GROUPED)), strict=True
    ):
        assert scored.set_aside == {}
        for name, values in scored.arrays.items():
            np.testing.assert_array_equal(values, expected.arrays[name])
        assert all(document_bytes(shard, scored.arrays, i) == blank_bytes(shard, scored.arrays, i) for i in bad)
    nothing = score(target, store, without(shard, range(len(shard))), GROUPED)
    assert (nothing.set_aside, nothing.arrays["counts"].sum()) == ({}, 0)


@pytest.mark.parametrize("batch_tokens", [TOGETHER, GROUPED, ALONE])
def test_progress_counts_the_scored_rows(target, store, shard, batch_tokens):
    limit = int(shard.ids.max())
    bad = holders(shard, lambda ids: ids >= limit)
    seen = []
    lm = SplitLM(shorten(target, limit), VOCAB_SIZE)
    score_target(lm, shard, store.spec.target, batch_tokens=batch_tokens, progress=seen.append)
    assert sum(seen) == without(shard, bad).loss_mask.sum()
