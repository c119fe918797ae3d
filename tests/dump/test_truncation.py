"""Truncation and draws on the device: the largest vocabulary, tokens of probability 0, rows of NaN."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from logitstore.dump.scoring import truncation
from logitstore.dump.scoring.truncation import truncate, uniforms
from logitstore.format.schemes import make_scheme
from logitstore.format.spec import TargetSpec
from logitstore.models.support import normalised
from tests.helpers import stores

LARGEST = 262_144
OPTIONS = {"topk": {"k": 8}, "nucleus": {"k": 8}, "sample": {"num_draws": 20}, "hybrid": {"num_draws": 20}}


def run(scheme, logits, labels=None, shard=0):
    spec = TargetSpec(model=stores.MODEL, scheme=make_scheme(scheme, OPTIONS[scheme]))
    labels = torch.zeros(len(logits), dtype=torch.int64) if labels is None else labels
    uniform = torch.from_numpy(uniforms(spec, shard, len(logits)))
    return truncate(logits, labels, spec, torch.from_numpy(spec.codebook.boundaries), uniform), spec


@pytest.mark.parametrize("scheme", ["sample", "hybrid"])
def test_rare_tokens_of_the_largest_vocabulary_are_drawn_with_the_right_frequency(scheme):
    """One token has 0.9 and 262,143 tokens have 4e-7 each. A cumulative sum in float32 would miss most of them."""
    num_rows, tail = 128, 0.1
    logits = torch.full((1, LARGEST), float(np.log(tail / (LARGEST - 1))))
    logits[0, 5] = np.log(1 - tail)
    ids, spec = [], None
    for shard in range(8):
        kept, spec = run(scheme, logits.expand(num_rows, -1), shard=shard)
        used = kept.token_ids < LARGEST
        assert (kept.token_ids[:, 1:] > kept.token_ids[:, :-1])[used[:, 1:]].all()
        ids.append(kept.token_ids[used & (kept.token_ids != 5)])
        weight = kept.draws.double() * spec.step if scheme == "sample" else used.double() * spec.step
        weight = weight.where(used & (kept.token_ids != 5), 0.0).sum(-1)
        # The bound holds for 20 binomial draws, and for the two systematic draws that 0.1 / step allows.
        assert abs(weight.mean() - tail) < 5 * (tail * (1 - tail) / spec.scheme.num_draws / num_rows) ** 0.5
    ids = torch.cat(ids).numpy()
    assert len(ids) > 1500
    # The ids are spread evenly: nearly all differ, and all remainders and eighths of the vocabulary are equally common.
    assert len(np.unique(ids)) > 0.98 * len(ids) * (1 - len(ids) / 2 / LARGEST)
    for places in (ids % 8, ids * 8 // LARGEST):
        counts = np.bincount(places.astype(int), minlength=8)
        assert (np.abs(counts - len(ids) / 8) < 5 * np.sqrt(len(ids) / 8)).all()
    assert np.abs(ids.mean() / LARGEST - 0.5) < 5 * (1 / 12 / len(ids)) ** 0.5


@pytest.mark.parametrize("num_marks", [1, 3, 40])
@pytest.mark.parametrize("vocab_size", [1, 255, 256, 257, 3000, 20_000])
def test_marks_are_located_as_by_a_float64_cumulative_sum(vocab_size, num_marks):
    rng = np.random.default_rng(vocab_size)
    mass = rng.exponential(1.0, (50, vocab_size)).astype(np.float32) ** 4
    mass[:, rng.random(vocab_size) < 0.3] = 0.0
    mass[:, -1] = 1.0
    ends = mass.astype(float).cumsum(-1)
    shares = rng.random((50, num_marks))
    shares[0, 0] = 0.0
    for of_sum, marks in ((True, shares), (False, 1.3 * shares * ends[:, -1:])):
        found = truncation._first_above(torch.from_numpy(mass), torch.from_numpy(marks), of_sum=of_sum).numpy()
        wanted = marks * ends[:, -1:] if of_sum else marks
        expected = np.array([np.searchsorted(*pair, side="right") for pair in zip(ends, wanted, strict=True)])
        # A mark within a rounding error of a boundary may be on either side of it.
        differ = found != expected
        near = np.abs(np.take_along_axis(ends, np.minimum(expected, found).clip(max=vocab_size - 1), 1) - wanted)
        assert (near[differ] < 1e-6 * ends[:, -1].max()).all()
        assert differ.mean() < 0.01
        assert (mass[np.nonzero(found < vocab_size)[0], found[found < vocab_size]] > 0).all()


def test_largest_share_below_1_selects_a_token_with_mass():
    mass = torch.tensor([[0.25, 0.5, 0.0, 0.25, 0.0]]).repeat(1, 400)
    share = torch.full((1, 1), np.nextafter(1.0, 0.0), dtype=torch.float64)
    assert mass[0, truncation._first_above(mass, share, of_sum=True)[0, 0]] > 0


@pytest.mark.parametrize("scheme", OPTIONS)
def test_tokens_of_probability_zero_give_finite_values(scheme):
    logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(0))
    logits[:, ::2] = -torch.inf
    p = logits.double().softmax(-1)
    kept, _ = run(scheme, logits, labels=torch.tensor([0, 1, 2, 3, 4, 5]))
    entropy = -torch.special.xlogy(p, p).sum(-1)
    torch.testing.assert_close(kept.entropy.double(), entropy, rtol=1e-5, atol=0)
    label = p[torch.arange(6), torch.arange(6)].log()
    torch.testing.assert_close(kept.label_logprob.double(), label, rtol=1e-5, atol=0)
    assert (kept.label_logprob[::2] == -torch.inf).all()
    assert (kept.tail > -torch.inf).all()


@pytest.mark.parametrize("vocab_size", [300, 30_000])
@pytest.mark.parametrize("scheme", OPTIONS)
def test_rows_of_nan_are_visible_and_do_not_affect_other_rows(scheme, vocab_size):
    logits = torch.randn(4, vocab_size, generator=torch.Generator().manual_seed(0))
    good, _ = run(scheme, logits)
    logits[1, 7] = torch.nan
    logits[2] = -torch.inf
    logits[3, 9] = torch.inf
    kept, _ = run(scheme, logits)
    assert kept.label_logprob[1:].isnan().all()
    assert kept.token_ids.max() <= vocab_size
    assert all(torch.equal(values[0], before[0]) for values, before in zip(kept, good, strict=True))


@pytest.mark.parametrize("num_likely", [1, 64])
def test_probabilities_of_the_largest_vocabulary_are_normalised(num_likely):
    """With a flat tail behind a head, the sum of float32's log_softmax is wrong by 1e-3."""
    logits = torch.zeros(2, LARGEST)
    logits[:, :num_likely] = 9.0
    exact = logits.double().log_softmax(-1)
    assert (normalised(logits) - exact).abs().max() < 3e-6
    kept, _ = run("hybrid", logits)
    p = exact.exp()
    torch.testing.assert_close(kept.entropy.double(), -(p * exact).sum(-1), rtol=1e-5, atol=0)
    torch.testing.assert_close(kept.label_logprob.double(), exact[:, 0], rtol=0, atol=3e-6)
    kept, _ = run("topk", logits)
    ids = kept.token_ids.long()
    torch.testing.assert_close(kept.tail.exp().double(), 1 - p.gather(1, ids).sum(-1), rtol=1e-5, atol=0)
