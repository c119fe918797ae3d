"""What is drawn stands for the whole distribution without bias; what is renormalised does not: the same test of both.

Over many seeds the mean of an estimate lies within a few of its standard errors of the truth. The standard errors are
those that theory gives (or the sample's own, for sums), the bounds hold with a probability of 0.9999 if there is no
bias, and seeds are fixed. N rows, V vocabulary, S seeds.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import stores
import torch

from logitstore import codec
from logitstore.dump.truncation import truncate, uniforms
from logitstore.schemes import Scheme
from logitstore.spec import TargetSpec
from logitstore.support import Support, on_support, soft_cross_entropy
from trainer.acceptance import row_acceptance

V = 300
NUM_SEEDS = 1500
SHARPNESS = (0.0, 1.0, 2.0, 4.0, 8.0)
SCHEMES = {
    "sample": Scheme(name="sample", k=0, num_draws=12),
    "hybrid": Scheme(name="hybrid", k=0, num_draws=12),
    "hybrid of many": Scheme(name="hybrid", k=0, num_draws=60),
}


@pytest.fixture(scope="module")
def case():
    """Logits of five distributions from flat to peaked, and of a draft that is neither good nor bad."""
    rng = np.random.default_rng(0)
    p = torch.from_numpy(rng.normal(0, 1, (len(SHARPNESS), V)) * np.array(SHARPNESS)[:, None]).float()
    q = torch.from_numpy(0.7 * p.numpy() + rng.normal(0, 1, p.shape)).float()
    return SimpleNamespace(logits=p, p=p.double().softmax(-1).numpy(), draft=q, q=q.double().softmax(-1).numpy())


def target(scheme):
    return TargetSpec(model=stores.MODEL, scheme=scheme)


def stored(case, spec, shard=0):
    """The rows as a reader has them: truncated or drawn, coded, decoded."""
    boundaries = torch.from_numpy(spec.codebook.boundaries)
    uniform = torch.from_numpy(uniforms(spec, shard, len(case.logits)))
    kept = truncate(case.logits, torch.zeros(len(case.logits), dtype=torch.int64), spec, boundaries, uniform)
    used = np.arange(spec.room) < kept.counts.numpy()[:, None]
    arrays = {
        "counts": kept.counts.numpy().astype(np.uint16),
        "gaps": codec.gaps(kept.token_ids.numpy()[used], kept.counts.numpy()),
        "logprobs": kept.codes.numpy()[used],
        "draws": kept.draws.numpy()[used].astype(np.uint16),
        **{name: getattr(kept, name).numpy() for name in ("tail", "label_logprob", "entropy")},
    }
    return codec.decode(arrays, spec)


def drawn(case, scheme, num_seeds=NUM_SEEDS):
    """Rows of many seeds, with the places of all N rows."""
    for seed in range(num_seeds):
        spec = target(dataclasses.replace(scheme, seed=seed))
        yield spec, stored(case, spec)


def supports(rows):
    places = np.arange(len(rows))
    return Support.of(rows.padded(places), torch.device("cpu")), Support.of(rows.weighed(places), torch.device("cpu"))


def dense(support):
    """[N, V]: what entries stand for."""
    return torch.zeros(len(support), V).scatter_add_(1, support.token_ids, support.probs).double().numpy()


def exact(case, spec):
    """Bool [N, V]: what hybrid keeps for itself, whose only error is that of its code."""
    return (case.p >= spec.step) if spec.scheme.name == "hybrid" else np.zeros_like(case.p, dtype=bool)


def coding_error(case, spec):
    """[N, V]: the most by which codes, and the scaling to 1, move a probability that stands for itself."""
    codes = spec.codebook.encode(np.log(np.maximum(case.p, 1e-30)).astype(np.float32))
    return np.where(exact(case, spec), case.p * 8 * spec.codebook.max_errors[codes], 0.0)


@pytest.mark.parametrize("name", SCHEMES)
def test_weights_are_unbiased_estimates_of_every_probability(case, name):
    total = np.zeros_like(case.p)
    for _, rows in drawn(case, SCHEMES[name]):
        total += dense(supports(rows)[1])
    mean, spec = total / NUM_SEEDS, target(SCHEMES[name])
    if name == "sample":
        variance = case.p * (1 - case.p) / spec.scheme.num_draws
    else:
        variance = np.where(exact(case, spec), 0.0, case.p * spec.step - case.p**2)
    error = np.sqrt(variance / NUM_SEEDS)
    # 1,500 estimates; where fewer than 20 draws are to be expected a normal bound does not hold
    is_seen = exact(case, spec) | (case.p * NUM_SEEDS / spec.step > 20)
    assert (np.abs(mean - case.p) <= 5.3 * error + coding_error(case, spec) + 1e-6)[is_seen].all()
    assert is_seen.mean() > 0.4
    rare = np.where(is_seen, 0, 1) * (mean - case.p)
    assert (np.abs(rare.sum(-1)) <= 5.3 * np.sqrt((np.where(is_seen, 0, variance)).sum(-1) / NUM_SEEDS) + 1e-6).all()


def test_the_same_test_finds_the_bias_of_a_renormalised_top_k(case):
    spec = target(Scheme(k=12))
    rows = stored(case, spec)
    naive = dense(supports(rows)[0])
    naive /= naive.sum(-1, keepdims=True)
    error = np.sqrt(case.p * (1 - case.p) / 12 / NUM_SEEDS)
    far = (np.abs(naive - case.p) > 5.3 * error + 0.05 * case.p + 1e-6).mean(-1)
    assert (far[:3] > 0.25).all()  # all but the most peaked distributions


@pytest.mark.parametrize("name", SCHEMES)
def test_gradient_and_divergence_are_unbiased(case, name):
    """Of the mean over rows with respect to the draft's logits, against float64 over the whole vocabulary."""
    gradients, losses = [], []
    for _, rows in drawn(case, SCHEMES[name], 600):
        weighed = supports(rows)[1]
        logits = case.draft.clone().requires_grad_()
        ce = soft_cross_entropy(weighed, *on_support(logits.log_softmax(-1), weighed))
        ce.sum().backward()
        gradients.append(logits.grad.double().numpy())
        losses.append((ce.detach() - weighed.entropy()).double().numpy())
    gradients, losses = np.array(gradients), np.array(losses)
    slack = coding_error(case, target(SCHEMES[name]))
    truth = case.q - case.p
    kl = (case.p * (np.log(np.maximum(case.p, 1e-300)) - np.log(case.q))).sum(-1)
    errors = losses.std(0) / np.sqrt(len(losses))
    assert (np.abs(losses.mean(0) - kl) <= 4.5 * errors + (slack * np.abs(np.log(case.q))).sum(-1) + 0.005 * kl).all()
    # along a few directions, in which thousands of small errors of one sign would add up
    for direction in (truth, case.q, case.p, np.log(case.q)):
        along = (gradients * direction).sum(-1)
        error = along.std(0) / np.sqrt(len(along))
        expected = (truth * direction).sum(-1)
        most = (slack * (np.abs(direction) + np.abs(case.q * direction).sum(-1, keepdims=True))).sum(-1)
        assert (np.abs(along.mean(0) - expected) <= 4.5 * error + most + 1e-5).all()


@pytest.mark.parametrize("name", SCHEMES)
def test_acceptance_is_unbiased_and_within_its_bounds(case, name):
    alpha = np.minimum(case.p, case.q).sum(-1)
    estimates = []
    for _, rows in drawn(case, SCHEMES[name], 600):
        probabilities, weighed = supports(rows)
        found = row_acceptance(case.draft.log_softmax(-1), *[probabilities] * 3, weighed)
        estimates.append(found.alpha_estimate.double().numpy())
    estimates = np.array(estimates)
    error = estimates.std(0) / np.sqrt(len(estimates))
    # the codes move p by up to 2% where it is likely and 6% where it is not, up as often as down
    assert (np.abs(estimates.mean(0) - alpha) <= 4.5 * error + 0.004).all()


def test_a_truncated_plug_in_is_not(case):
    alpha = np.minimum(case.p, case.q).sum(-1)
    rows = stored(case, target(Scheme(k=12)))
    probabilities, _ = supports(rows)
    found = row_acceptance(case.draft.log_softmax(-1), *[probabilities] * 3)
    assert (found.alpha_estimate.numpy() - alpha)[1:3].min() > 0.02


@pytest.mark.parametrize("name", SCHEMES)
def test_the_same_rows_have_the_same_draws_however_they_are_batched(case, name):
    spec = target(SCHEMES[name])
    boundaries = torch.from_numpy(spec.codebook.boundaries)
    labels = torch.zeros(len(case.logits), dtype=torch.int64)
    uniform = torch.from_numpy(uniforms(spec, 7, len(labels)))
    together = truncate(case.logits, labels, spec, boundaries, uniform)
    for i in range(len(labels)):
        alone = truncate(case.logits[i : i + 1], labels[i : i + 1], spec, boundaries, uniform[i : i + 1])
        assert all(torch.equal(one[0], whole[i]) for one, whole in zip(alone, together, strict=True))
    assert not np.array_equal(uniforms(spec, 7, 5), uniforms(spec, 8, 5))


@pytest.mark.parametrize("name", SCHEMES)
def test_what_is_kept_is_what_the_scheme_says(case, name):
    for spec, rows in drawn(case, SCHEMES[name], 50):
        assert rows.counts.min() >= 1
        assert rows.counts.max() <= spec.room
        for i in range(len(rows)):
            row = rows.slice(i, i + 1)
            assert (np.diff(row.token_ids.astype(int)) > 0).all()
            assert abs(np.exp(row.logprobs.astype(float)).sum() + row.tail_mass[0] - 1) < 1e-5
            if name == "sample":
                assert np.rint(row.weights * spec.scheme.num_draws).sum() == spec.scheme.num_draws
            else:
                likely = np.flatnonzero(case.p[i] >= spec.step * (1 + 1e-6))
                assert np.isin(likely, row.token_ids).all()
                is_drawn = ~np.isin(row.token_ids, np.flatnonzero(case.p[i] >= spec.step * (1 - 1e-6)))
                assert (row.weights[is_drawn] == np.float32(spec.step)).all()
                assert abs(row.weights.sum() - 1) < spec.step + 0.02
