"""Optimizer steps compared with plain arithmetic: selection across micro-batches, the denominator, and two ranks."""

import copy
import json
import math
import shlex

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.utils import parameters_to_vector
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

import logitstore
from tests.helpers.runs import torchrun
from tests.helpers.tiny import VOCAB_SIZE
from trainer import DocumentDataset, DraftModule, DraftTrainer
from trainer.loss.objectives import make_objective
from trainer.loss.selection import make_rule

BATCH, ACCUMULATION = 3, 2


def dataset(tiny_store, columns=(), **options):
    losses = {"reference_ce": "reference", "initial_ce": "reference"}
    return DocumentDataset([logitstore.open(tiny_store)], columns=columns, losses=losses, **options)


def run(tiny, tiny_store, folder, rule, denominator, steps=1, queue_rows=30_000, bf16=False, **options):
    draft = AutoModelForCausalLM.from_pretrained(tiny.draft)
    first = copy.deepcopy(draft)
    args = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=BATCH, optim="sgd", learning_rate=0.5,
        gradient_accumulation_steps=ACCUMULATION, lr_scheduler_type="constant", max_grad_norm=0.0, use_cpu=True,
        bf16=bf16, disable_tqdm=True, dataloader_pin_memory=False, save_strategy="no", logging_steps=1,
        logging_first_step=True,
    )  # fmt: skip
    data = dataset(tiny_store, rule.selection.columns, **options)
    module = DraftModule(draft, vocab_size=VOCAB_SIZE, objective=make_objective("forward_kl"), rule=rule)
    tokenizer = AutoTokenizer.from_pretrained(tiny.tokenizer)
    trainer = DraftTrainer(module, args, data, tokenizer, denominator=denominator, queue_rows=queue_rows)
    trainer.train()
    return first, draft, trainer.state.log_history, data


def micro_batches(data, step=0):
    """Returns the documents of each micro-batch of an optimizer step."""
    epoch = data.order.epoch(0)
    size = BATCH * ACCUMULATION
    samples = [data[epoch[place]][0] for place in range(step * size, (step + 1) * size)]
    return [samples[start : start + BATCH] for start in range(0, size, BATCH)]


def dense_losses(draft, sample):
    """Returns KL(p‖q) and CE(p, q) of the rows of a document that count, in float64 and differentiable."""
    logits = draft(input_ids=torch.from_numpy(sample.ids.astype(np.int64))[None]).logits[0, :, :VOCAB_SIZE]
    logprobs = logits.double().log_softmax(-1)
    kl, ce = [], []
    for row in np.flatnonzero(sample.loss_mask):
        entries = sample.rows.slice(row, row + 1)
        p = torch.from_numpy(np.exp(entries.logprobs.astype(float)))
        tail = torch.tensor(float(entries.tail_mass[0]), dtype=torch.float64)
        kept = logprobs[row, torch.from_numpy(entries.token_ids.astype(np.int64))]
        left = (1 - kept.exp().sum()).clamp_min(1e-6).log()
        ce.append(-(p * kept).sum() - tail * left)
        kl.append(ce[-1] + (p * p.log()).sum() + torch.xlogy(tail, tail))
    return torch.stack(kl), torch.stack(ce)


def values(draft, sample):
    """Returns KL and loss gap of each row."""
    kl, ce = dense_losses(draft, sample)
    return kl, ce.detach() - torch.from_numpy(sample.columns["reference_ce"][sample.loss_mask].astype(float))


def quantile(scores, keep):
    return np.quantile(scores.numpy(), 1 - keep)


def kept_rows(rule, micro, queue):
    """Yields the kept rows of each document, one list per micro-batch. `micro` are lists of score tensors."""
    everything = torch.cat([score for scores in micro for score in scores])
    for scores in micro:
        own = torch.cat(scores)
        if rule.scope == "document":
            sizes = [math.ceil(rule.keep * len(score)) for score in scores]
            yield [score >= score.sort(descending=True).values[n - 1] for score, n in zip(scores, sizes, strict=True)]
            continue
        compared = {"micro_batch": own, "step": everything, "queue": torch.cat([queue[0], own])}[rule.scope]
        queue[0] = torch.cat([queue[0], own])[-queue[1] :]
        yield [score >= quantile(compared, rule.keep) for score in scores]


@pytest.mark.parametrize("denominator", ["kept", "masked"])
@pytest.mark.parametrize("scope", ["micro_batch", "step", "document", "queue", None])
def test_step_equals_plain_arithmetic(scope, denominator, tiny, tiny_store, tmp_path):
    """Two steps of two micro-batches each, so that the queue has an effect. The tolerance is 1e-4 of float64."""
    rule = make_rule("all" if scope is None else "adaspec", keep=0.3, scope=scope)
    first, draft, history, data = run(tiny, tiny_store, tmp_path, rule, denominator, steps=2, queue_rows=500)
    if scope is None:
        data = dataset(tiny_store, ("reference_ce",))
    queue = [torch.zeros(0, dtype=torch.float64), 500]
    for step in range(2):
        first.zero_grad()
        micro = [[values(first, sample) for sample in samples] for samples in micro_batches(data, step)]
        kls = torch.cat([kl for found in micro for kl, _ in found])
        if scope is None:
            kept = torch.ones(len(kls), dtype=torch.bool)
        else:
            scores = [[score for _, score in found] for found in micro]
            gaps = torch.cat([score for found in scores for score in found])
            kept = torch.cat([rows for parts in kept_rows(rule, scores, queue) for rows in parts])
        divisor = kept.sum() if denominator == "kept" else len(kept)
        loss = (kls * kept).sum() / divisor
        loss.backward()
        with torch.no_grad():
            for parameter in first.parameters():
                parameter -= 0.5 * parameter.grad
        logged = history[step]
        assert logged["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
        assert logged["kl"] == pytest.approx(float(kls.detach().mean()), rel=1e-4)
        assert logged["denominator"] == int(divisor)
        assert logged["kept_fraction"] == pytest.approx(float(kept.float().mean()))
        if scope is not None:
            assert logged["score_mean"] == pytest.approx(float(gaps.mean()), abs=1e-5)
            assert logged["score_std"] == pytest.approx(float(gaps.std(correction=0)), rel=1e-3)
            assert logged["score_kept"] == pytest.approx(float(gaps[kept].mean()), abs=1e-5)
            assert logged["kept_kl"] == pytest.approx(float(kls[kept].detach().mean()), rel=1e-4)
            assert ("score_threshold" in logged) == (scope != "document")
    for name, found in draft.named_parameters():
        torch.testing.assert_close(found, first.get_parameter(name), rtol=1e-4, atol=2e-6)


def test_rows_outside_the_selection_count_with_the_outside_weight(tiny, tiny_store, tmp_path):
    rule = make_rule("adaspec", keep=0.3, outside_weight=0.2)
    first, draft, history, data = run(tiny, tiny_store, tmp_path, rule, "kept")
    total, divisor = 0.0, 0.0
    for samples in micro_batches(data):
        found = [values(first, sample) for sample in samples]
        scores = torch.cat([score for _, score in found])
        weights = torch.where(scores >= quantile(scores, 0.3), 1.0, 0.2)
        total, divisor = total + (torch.cat([kl for kl, _ in found]) * weights).sum(), divisor + weights.sum()
    (total / divisor).backward()
    assert history[0]["loss"] == pytest.approx(float(total.detach() / divisor), rel=1e-4)
    for name, found in draft.named_parameters():
        before = first.get_parameter(name)
        torch.testing.assert_close(found, before - 0.5 * before.grad, rtol=1e-4, atol=2e-6)


def test_step_without_selected_rows_changes_nothing(tiny, tiny_store, tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.loss.selection.ACCEPTED_TOP", 0)
    first, draft, history, _ = run(tiny, tiny_store, tmp_path, make_rule("accepted", keep=1.0), "kept")
    assert history[0]["kept_fraction"] == 0.0
    assert history[0]["loss"] == 0.0
    assert all(torch.equal(found, first.get_parameter(name)) for name, found in draft.named_parameters())


@pytest.mark.parametrize("scope", ["micro_batch", "step"])
def test_step_in_mixed_precision_is_close_to_float32(scope, tiny, tiny_store, tmp_path):
    """In mixed precision, hidden states have 8 bits of mantissa; log-sum-exp, losses and weights have 24."""
    rule = make_rule("adaspec", keep=0.3, scope=scope)
    first, whole, (logged, *_), _ = run(tiny, tiny_store, tmp_path / "float32", rule, "kept")
    _, half, (found, *_), _ = run(tiny, tiny_store, tmp_path / "bfloat16", rule, "kept", bf16=True)
    assert found["kept_fraction"] == pytest.approx(logged["kept_fraction"], abs=0.01)
    assert found["kl"] == pytest.approx(logged["kl"], rel=0.01)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float32}
    steps = [parameters_to_vector(draft.parameters()) for draft in (first, whole, half)]
    exact, rounded = steps[1] - steps[0], steps[2] - steps[0]
    assert torch.cosine_similarity(exact, rounded, dim=0) > 0.97
    assert not torch.equal(exact, rounded)


SCOPES = {
    "all": ["--selection", "all"],
    "step": ["--selection", "adaspec", "--reference", "reference", "--scope", "step", "--keep", "0.3"],
    "document": ["--selection", "draft_entropy", "--keep", "0.2", "--objective", "kl_tv"],
    "random": ["--selection", "random", "--scope", "step", "--packing", "true"],
}
PLAIN = shlex.split(
    "--optim sgd --learning_rate 0.5 --lr_scheduler_type constant --max_steps 3 --use_cpu true --logging_steps 1 "
    "--save_strategy no --no_progress true --max_grad_norm 0.5 --gradient_accumulation_steps 2"
)


def test_two_ranks_make_the_same_update_as_one_with_the_same_total_batch(tiny, tiny_store, tmp_path):
    """Updates, selected rows and logged values are equal up to the float32 rounding of sums in another order."""
    common = ["--store", tiny_store, "--draft", tiny.draft, *PLAIN]
    sizes = {1: "4", 2: "2"}
    for ranks, size in sizes.items():
        own = [*common, "--per_device_train_batch_size", size, "--output_dir"]
        torchrun(ranks, *([*own, str(tmp_path / f"{name}{ranks}"), *asked] for name, asked in SCOPES.items()))
    for name in SCOPES:
        one, two = (load_file(tmp_path / f"{name}{ranks}" / "model.safetensors") for ranks in sizes)
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-6)
        states = [json.loads((tmp_path / f"{name}{n}" / "trainer_state.json").read_text()) for n in sizes]
        histories = [state["log_history"] for state in states]
        for alone, shared in zip(*histories, strict=True):
            for key in alone.keys() & {"loss", "kl", "alpha", "kept_fraction", "denominator", "score_threshold"}:
                assert shared[key] == pytest.approx(alone[key], rel=1e-4, abs=1e-5), (name, key)
