"""Drawn entries estimate the whole distribution without bias; a renormalised top k does not. One test checks both.

Over many seeds, the mean of an unbiased estimate lies within a few standard errors of the true value. The standard
errors come from theory, or from the sample for sums. Without bias the bounds hold with probability 0.9999. The seeds
are fixed. N rows, V vocabulary, S seeds.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from logitstore.dump.scoring.truncation import truncate, uniforms
from logitstore.format.schemes import Scheme
from logitstore.models.support import Support, estimated_cross_entropy, on_support
from logitstore.rows import codec
from tests.helpers import stores
from tests.helpers.rows import random_target
from trainer.evaluation.from_cache import row_acceptance

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
    """Logits of five distributions from flat to peaked, and of a draft of medium quality."""
    rng = np.random.default_rng(0)
    p = torch.from_numpy(rng.normal(0, 1, (len(SHARPNESS), V)) * np.array(SHARPNESS)[:, None]).float()
    q = torch.from_numpy(0.7 * p.numpy() + rng.normal(0, 1, p.shape)).float()
    return SimpleNamespace(logits=p, p=p.double().softmax(-1).numpy(), draft=q, q=q.double().softmax(-1).numpy())


def stored(case, spec, shard=0):
    """Returns the rows as a reader sees them: truncated or drawn, encoded and decoded."""
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
    """Yields the spec and the N rows of each of many seeds."""
    for seed in range(num_seeds):
        spec = random_target(dataclasses.replace(scheme, seed=seed))
        yield spec, stored(case, spec)


def support(rows):
    return Support.of(rows.padded(np.arange(len(rows))), torch.device("cpu"))


def dense(rows):
    """Returns the probability that the entries of each row estimate for each token, [N, V]."""
    found = support(rows)
    stand_for = found.probs if found.weights is None else found.weights
    return torch.zeros(len(found), V).scatter_add_(1, found.token_ids, stand_for).double().numpy()


def exact(case, spec):
    """Returns a mask [N, V] of the tokens that hybrid always keeps. Their only error is the coding error."""
    return (case.p >= spec.step) if spec.scheme.name == "hybrid" else np.zeros_like(case.p, dtype=bool)


def coding_error(case, spec):
    """Returns the largest error of a probability that is kept exactly, from its code and the scaling to 1, [N, V]."""
    codes = spec.codebook.encode(np.log(np.maximum(case.p, 1e-30)).astype(np.float32))
    return np.where(exact(case, spec), case.p * 8 * stores.max_errors(spec.codebook)[codes], 0.0)


@pytest.mark.parametrize("name", SCHEMES)
def test_weights_are_unbiased_estimates_of_every_probability(case, name):
    total = np.zeros_like(case.p)
    for _, rows in drawn(case, SCHEMES[name]):
        total += dense(rows)
    mean, spec = total / NUM_SEEDS, random_target(SCHEMES[name])
    if name == "sample":
        variance = case.p * (1 - case.p) / spec.scheme.num_draws
    else:
        variance = np.where(exact(case, spec), 0.0, case.p * spec.step - case.p**2)
    error = np.sqrt(variance / NUM_SEEDS)
    # There are 1,500 estimates. The normal approximation fails for tokens with fewer than 20 expected draws.
    is_seen = exact(case, spec) | (case.p * NUM_SEEDS / spec.step > 20)
    assert (np.abs(mean - case.p) <= 5.3 * error + coding_error(case, spec) + 1e-6)[is_seen].all()
    assert is_seen.mean() > 0.4
    rare = np.where(is_seen, 0, 1) * (mean - case.p)
    assert (np.abs(rare.sum(-1)) <= 5.3 * np.sqrt((np.where(is_seen, 0, variance)).sum(-1) / NUM_SEEDS) + 1e-6).all()


def test_bias_of_a_renormalised_top_k_is_detected(case):
    spec = random_target(Scheme(k=12))
    rows = stored(case, spec)
    naive = dense(rows)
    naive /= naive.sum(-1, keepdims=True)
    error = np.sqrt(case.p * (1 - case.p) / 12 / NUM_SEEDS)
    far = (np.abs(naive - case.p) > 5.3 * error + 0.05 * case.p + 1e-6).mean(-1)
    assert (far[:3] > 0.25).all()  # all but the most peaked distributions


def estimates(case, stored):
    """Returns the gradient by the draft's logits [N, V], KL [N] and alpha [N] that the product estimates; float64."""
    logits = case.draft.clone().requires_grad_()
    ce = estimated_cross_entropy(stored, *on_support(logits.log_softmax(-1), stored))
    ce.sum().backward()
    found = row_acceptance(case.draft.log_softmax(-1), *[stored] * 3)
    kl = (ce.detach() - stored.entropy()).double().numpy()
    return logits.grad.double().numpy(), kl, found.alpha_estimate.double().numpy()


def ratios(case, name, gradient, kl, alpha):
    """Returns the errors of estimates relative to the error that is allowed for the mean of 600 seeds.

    The true values use the whole vocabulary. Returns ratios for the gradients along four directions [4, N], in which
    many small errors of one sign would add up, for KL [N] and for alpha [N].
    """
    drawn_ones = many(case, name)
    slack = coding_error(case, random_target(SCHEMES[name]))
    truth = case.q - case.p
    along = []
    for direction in (truth, case.q, case.p, np.log(case.q)):
        error = standard_error((drawn_ones.gradients * direction).sum(-1))
        most = (slack * (np.abs(direction) + np.abs(case.q * direction).sum(-1, keepdims=True))).sum(-1)
        along.append(np.abs(((gradient - truth) * direction).sum(-1)) / (4.5 * error + most + 1e-5))
    true_kl = (case.p * (np.log(np.maximum(case.p, 1e-300)) - np.log(case.q))).sum(-1)
    most = (slack * np.abs(np.log(case.q))).sum(-1) + 0.005 * true_kl
    of_kl = np.abs(kl - true_kl) / (4.5 * standard_error(drawn_ones.kls) + most)
    # Coding changes p by up to 2% for likely tokens and 6% for unlikely ones, in both directions equally often.
    true_alpha = np.minimum(case.p, case.q).sum(-1)
    of_alpha = np.abs(alpha - true_alpha) / (4.5 * standard_error(drawn_ones.alphas) + 0.004)
    return np.array(along), of_kl, of_alpha


def standard_error(values):
    return values.std(0) / np.sqrt(len(values))


MANY = {}


def many(case, name):
    """Returns the estimates of 600 seeds of a scheme, computed once."""
    if name not in MANY:
        found = []
        for _, rows in drawn(case, SCHEMES[name], 600):
            found.append(estimates(case, support(rows)))
        gradients, kls, alphas = (np.array(values) for values in zip(*found, strict=True))
        MANY[name] = SimpleNamespace(gradients=gradients, kls=kls, alphas=alphas)
    return MANY[name]


@pytest.mark.parametrize("name", SCHEMES)
def test_gradient_divergence_and_acceptance_are_unbiased(case, name):
    found = many(case, name)
    for ratio in ratios(case, name, found.gradients.mean(0), found.kls.mean(0), found.alphas.mean(0)):
        assert (ratio <= 1).all()


@pytest.mark.parametrize("name", SCHEMES)
def test_bias_of_training_on_a_renormalised_top_k_is_detected(case, name):
    """The top k has as many entries as there are draws. Its acceptance rate is sum min(p / mass, q)."""
    rows = stored(case, random_target(Scheme(k=SCHEMES[name].num_draws)))
    kept = support(rows)
    probs = kept.probs / kept.probs.sum(-1, keepdim=True)
    naive = dataclasses.replace(kept, probs=probs, tail=torch.zeros_like(kept.tail))
    along, of_kl, of_alpha = ratios(case, name, *estimates(case, naive))
    assert (along.max(0)[:2] > 3).all()  # the two flattest distributions; the top k of a peaked one is complete
    assert (of_kl[:2] > 3).all()
    assert (of_alpha[:2] > 1).any()


def test_acceptance_estimate_from_truncated_rows_is_biased(case):
    """The tail is one bucket, so the estimate does not see how the draft's probability is distributed within it."""
    rows = stored(case, random_target(Scheme(k=12)))
    _, _, of_alpha = ratios(case, "sample", *estimates(case, support(rows)))
    assert (of_alpha[1:3] > 1).all()


@pytest.mark.parametrize("name", SCHEMES)
def test_draws_of_a_row_do_not_depend_on_its_batch(case, name):
    spec = random_target(SCHEMES[name])
    boundaries = torch.from_numpy(spec.codebook.boundaries)
    labels = torch.zeros(len(case.logits), dtype=torch.int64)
    uniform = torch.from_numpy(uniforms(spec, 7, len(labels)))
    together = truncate(case.logits, labels, spec, boundaries, uniform)
    for i in range(len(labels)):
        alone = truncate(case.logits[i : i + 1], labels[i : i + 1], spec, boundaries, uniform[i : i + 1])
        assert all(torch.equal(one[0], whole[i]) for one, whole in zip(alone, together, strict=True))
    assert not np.array_equal(uniforms(spec, 7, 5), uniforms(spec, 8, 5))


@pytest.mark.parametrize("name", SCHEMES)
def test_kept_entries_and_weights_follow_the_scheme(case, name):
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
