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

from logitstore.dump.scoring.truncation import truncate, uniforms
from logitstore.format.schemes import Scheme
from logitstore.format.spec import TargetSpec
from logitstore.models.support import Support, estimated_cross_entropy, on_support
from logitstore.rows import codec
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


def support(rows):
    return Support.of(rows.padded(np.arange(len(rows))), torch.device("cpu"))


def dense(rows):
    """[N, V]: what entries stand for."""
    found = support(rows)
    stand_for = found.probs if found.weights is None else found.weights
    return torch.zeros(len(found), V).scatter_add_(1, found.token_ids, stand_for).double().numpy()


def exact(case, spec):
    """Bool [N, V]: what hybrid keeps for itself, whose only error is that of its code."""
    return (case.p >= spec.step) if spec.scheme.name == "hybrid" else np.zeros_like(case.p, dtype=bool)


def coding_error(case, spec):
    """[N, V]: the most by which codes, and the scaling to 1, move a probability that stands for itself."""
    codes = spec.codebook.encode(np.log(np.maximum(case.p, 1e-30)).astype(np.float32))
    return np.where(exact(case, spec), case.p * 8 * stores.max_errors(spec.codebook)[codes], 0.0)


@pytest.mark.parametrize("name", SCHEMES)
def test_weights_are_unbiased_estimates_of_every_probability(case, name):
    total = np.zeros_like(case.p)
    for _, rows in drawn(case, SCHEMES[name]):
        total += dense(rows)
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
    naive = dense(rows)
    naive /= naive.sum(-1, keepdims=True)
    error = np.sqrt(case.p * (1 - case.p) / 12 / NUM_SEEDS)
    far = (np.abs(naive - case.p) > 5.3 * error + 0.05 * case.p + 1e-6).mean(-1)
    assert (far[:3] > 0.25).all()  # all but the most peaked distributions


def estimates(case, stored):
    """What training and scoring see of some rows: gradients by the draft's logits [N, V], KL and alpha [N]; float64."""
    logits = case.draft.clone().requires_grad_()
    ce = estimated_cross_entropy(stored, *on_support(logits.log_softmax(-1), stored))
    ce.sum().backward()
    found = row_acceptance(case.draft.log_softmax(-1), *[stored] * 3)
    kl = (ce.detach() - stored.entropy()).double().numpy()
    return logits.grad.double().numpy(), kl, found.alpha_estimate.double().numpy()


def ratios(case, name, gradient, kl, alpha):
    """How far estimates are from the truth over the whole vocabulary, in what 600 seeds of a scheme may err by.

    Gradients along a few directions [4, N], in which thousands of small errors of one sign would add up; KL [N];
    alpha [N].
    """
    drawn_ones = many(case, name)
    slack = coding_error(case, target(SCHEMES[name]))
    truth = case.q - case.p
    along = []
    for direction in (truth, case.q, case.p, np.log(case.q)):
        error = standard_error((drawn_ones.gradients * direction).sum(-1))
        most = (slack * (np.abs(direction) + np.abs(case.q * direction).sum(-1, keepdims=True))).sum(-1)
        along.append(np.abs(((gradient - truth) * direction).sum(-1)) / (4.5 * error + most + 1e-5))
    true_kl = (case.p * (np.log(np.maximum(case.p, 1e-300)) - np.log(case.q))).sum(-1)
    most = (slack * np.abs(np.log(case.q))).sum(-1) + 0.005 * true_kl
    of_kl = np.abs(kl - true_kl) / (4.5 * standard_error(drawn_ones.kls) + most)
    # the codes move p by up to 2% where it is likely and 6% where it is not, up as often as down
    true_alpha = np.minimum(case.p, case.q).sum(-1)
    of_alpha = np.abs(alpha - true_alpha) / (4.5 * standard_error(drawn_ones.alphas) + 0.004)
    return np.array(along), of_kl, of_alpha


def standard_error(values):
    return values.std(0) / np.sqrt(len(values))


MANY = {}


def many(case, name):
    """Estimates of 600 seeds of a scheme; made once."""
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
def test_the_same_test_finds_the_bias_of_training_on_a_renormalised_top_k(case, name):
    """At as many entries as there are draws. Acceptance is sum min(p / mass, q), as those who renormalise have it."""
    rows = stored(case, target(Scheme(k=SCHEMES[name].num_draws)))
    kept = support(rows)
    probs = kept.probs / kept.probs.sum(-1, keepdim=True)
    naive = dataclasses.replace(kept, probs=probs, tail=torch.zeros_like(kept.tail))
    along, of_kl, of_alpha = ratios(case, name, *estimates(case, naive))
    assert (along.max(0)[:2] > 3).all()  # of the flatter distributions; a peaked one is all in the top
    assert (of_kl[:2] > 3).all()
    assert (of_alpha[:2] > 1).any()


def test_a_truncated_plug_in_is_biased_too(case):
    """With its tail as one more bucket: it does not see how the draft spreads its own within it."""
    rows = stored(case, target(Scheme(k=12)))
    _, _, of_alpha = ratios(case, "sample", *estimates(case, support(rows)))
    assert (of_alpha[1:3] > 1).all()


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
