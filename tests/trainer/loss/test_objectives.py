"""Objectives compared with dense float64 autograd, on the entries and over the whole vocabulary, and their bias."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logitstore.format.schemes import Scheme
from logitstore.models.support import TAIL_FLOOR, Support, on_support
from tests.helpers import rows
from tests.helpers.rows import random_target as target_of
from trainer.loss.objectives import OBJECTIVES, make_objective

DIVERGENCES = [name for name in OBJECTIVES if name != "label_nll"]
CASES = [
    (name, kind)
    for name in DIVERGENCES
    for kind in rows.KINDS
    if not (name == "renormalised_kl" and kind in ("drawn", "hybrid"))
]


def random_logits(num_rows, vocab_size, seed=1, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(num_rows, vocab_size, generator=generator, dtype=torch.float64)


def found(name, support, logits, beta=rows.BETA):
    return make_objective(name, beta=beta).divergence(support, *on_support(logits.log_softmax(-1), support))


def compare(name, support, logits):
    """Checks value and gradient in float32 against float64, with a tolerance of 2e-4."""
    one, other = logits.clone().requires_grad_(), logits.float().requires_grad_()
    expected, got = rows.losses(name, support, one, torch.zeros(len(support), dtype=torch.int64)), None
    got = found(name, support, other)
    expected.sum().backward()
    got.sum().backward()
    torch.testing.assert_close(got.double(), expected, rtol=2e-4, atol=2e-5)
    # Float32 rounds the logits and the sum of the kept probabilities. The draft's tail mass is 1 minus this sum, so its
    # absolute error does not shrink with the tail mass, and the gradient has the relative error in p_t / q_t.
    q_tail = 1 - logits.softmax(-1).gather(1, support.token_ids).where(support.used, 0).sum(-1)
    lost = support.tail * 2**-22 * (1 + logits.abs().amax(-1)) / q_tail.clamp_min(TAIL_FLOOR)
    assert ((other.grad - one.grad).abs() <= 5e-5 + 2e-4 * one.grad.abs() + lost[:, None]).all()


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_value_and_gradient_equal_the_dense_oracle(name, kind):
    compare(name, rows.random_rows(kind, 30, 40), random_logits(30, 40))


@given(st.sampled_from(CASES), st.integers(0, 12), st.integers(2, 60), st.integers(0, 2**31), st.floats(0.1, 4.0))
@settings(max_examples=60, deadline=None)
def test_value_and_gradient_equal_the_dense_oracle_for_any_shape(case, num_rows, vocab_size, seed, scale):
    name, kind = case
    support = rows.random_rows(kind, num_rows, vocab_size, seed)
    compare(name, support, random_logits(num_rows, vocab_size, seed + 1, scale))


# With draws, only the bound of reverse_kl is 0 in each row; the others are 0 on average. renormalised_kl has its
# minimum elsewhere, except over the whole vocabulary.
IS_LEAST = [
    (name, kind)
    for name, kind in CASES
    if (kind not in ("drawn", "hybrid") or name == "reverse_kl")
    and (name != "renormalised_kl" or kind == "whole vocabulary")
]


@pytest.mark.parametrize(("name", "kind"), IS_LEAST)
def test_draft_equal_to_the_target_has_zero_loss_and_no_gradient(name, kind):
    full = rows.random_rows("whole vocabulary", 20, 40)
    p = torch.zeros(20, 40, dtype=torch.float64).scatter(1, full.token_ids, full.probs.double())
    logits = p.log().requires_grad_()
    loss = found(name, rows.random_rows(kind, 20, 40), logits)
    loss.sum().backward()
    assert loss.abs().max() < 2e-5
    if name in ("forward_kl", "reverse_kl", "jsd", "renormalised_kl"):  # the others are not differentiable at p = q
        assert logits.grad.abs().max() < 2e-5


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_padding_of_entries_changes_nothing(name, kind):
    support, logits = rows.random_rows(kind, 10, 40), random_logits(10, 40)
    zeros = torch.zeros(10, 3)
    wider = dataclasses.replace(
        support,
        token_ids=torch.cat([support.token_ids, zeros.long()], 1),
        probs=torch.cat([support.probs, zeros], 1),
        weights=None if support.weights is None else torch.cat([support.weights, zeros], 1),
    )
    torch.testing.assert_close(found(name, wider, logits), found(name, support, logits), rtol=1e-6, atol=1e-7)


def dense(name, p, q, beta=rows.BETA):
    """Returns the divergence of each row over the whole vocabulary, in float64."""
    whole = Support(token_ids=torch.arange(p.shape[1]).expand(p.shape), probs=p, tail=torch.zeros(len(p)))
    return torch.stack([rows.ORACLES[name](whole, i, q.log()) for i in range(len(p))])


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "total_variation", "neg_log_alpha"])
@pytest.mark.parametrize("kind", ["one entry", "a tail", "ragged"])
def test_loss_of_truncated_rows_is_a_lower_bound_of_the_loss_over_the_vocabulary(name, kind):
    full = rows.random_rows("whole vocabulary", 40, 30, seed=5)
    p = torch.zeros(40, 30, dtype=torch.float64).scatter(1, full.token_ids, full.probs.double())
    logits = random_logits(40, 30, seed=6)
    kept = found(name, rows.random_rows(kind, 40, 30, seed=5), logits)
    exact = dense(name, p, logits.softmax(-1))
    assert (kept <= exact + 1e-5).all()
    assert (kept < exact - 1e-3).float().mean() > 0.5


def many_draws(num_rows, p, num_draws, generator):
    """Returns `num_rows` rows of draws from one distribution."""
    return rows.drawn_rows("drawn", p.expand(num_rows, -1), generator, num_draws)


@pytest.mark.parametrize("name", ["forward_kl", "jsd", "total_variation"])
@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_draws_give_unbiased_estimates_of_value_and_gradient(name, scale):
    """The mean of 20,000 rows of 12 draws is within 5 standard errors, which are below a tenth of the value."""
    generator = torch.Generator().manual_seed(3)
    p = (scale * torch.randn(1, 30, generator=generator, dtype=torch.float64)).softmax(-1)
    logits = 1.5 * torch.randn(1, 30, generator=generator, dtype=torch.float64)
    support = many_draws(20_000, p, 12, generator)
    leaf = logits.expand(20_000, -1).clone().requires_grad_()
    values = found(name, support, leaf)
    values.sum().backward()
    whole = logits.clone().requires_grad_()
    exact = dense(name, p, whole.softmax(-1))
    exact.sum().backward()
    for estimates, truth in ((values.detach()[:, None], exact.detach()), (leaf.grad, whole.grad[0])):
        error = estimates.std(0) / len(estimates) ** 0.5
        assert ((estimates.mean(0) - truth).abs() <= 5 * error + 1e-5).all()
    assert float(values.detach().std() / 20_000**0.5) < 0.1 * float(exact.detach())


def test_control_variate_of_jsd_reduces_the_noise_tenfold():
    """The draft prefers a token that the target considers unlikely."""
    generator = torch.Generator().manual_seed(4)
    p = torch.cat([torch.full((1, 10), 0.0999), torch.full((1, 10), 1e-4)], 1).double()
    support = many_draws(20_000, p / p.sum(), 12, generator)
    logits = torch.zeros(1, 20, dtype=torch.float64)
    logits[0, 10] = 3.0
    values = found("jsd", support, logits.expand(20_000, -1))
    ratio = logits.softmax(-1).expand(20_000, -1).gather(1, support.token_ids) / support.probs.where(support.used, 1.0)
    mixed = rows.BETA + (1 - rows.BETA) * ratio
    plain = -rows.BETA * mixed.log() + (1 - rows.BETA) * ratio * (ratio / mixed).log()
    plain = (support.weights * plain).sum(-1)
    assert float(values.std()) < 0.1 * float(plain.std())


def test_bias_of_neg_log_alpha_with_draws_has_the_documented_size():
    generator = torch.Generator().manual_seed(5)
    p = torch.randn(1, 30, generator=generator, dtype=torch.float64).softmax(-1)
    logits = 1.5 * torch.randn(1, 30, generator=generator, dtype=torch.float64)
    many = many_draws(20_000, p, 12, generator)
    estimates = found("total_variation", many, logits.expand(20_000, -1))
    alpha = 1 - float(dense("total_variation", p, logits.softmax(-1)))
    bias = float(found("neg_log_alpha", many, logits.expand(20_000, -1)).mean()) + torch.tensor(alpha).log()
    assert float(bias) == pytest.approx(float(estimates.var()) / (2 * alpha**2), rel=0.25)


def test_minimising_renormalised_kl_inflates_the_head_and_forward_kl_does_not():
    p = torch.tensor([[0.5, 0.2, 0.1, 0.1, 0.1]], dtype=torch.float64)
    support = Support(token_ids=torch.tensor([[0, 1]]), probs=p[:, :2], tail=torch.tensor([0.3], dtype=torch.float64))
    heads = {}
    for name in ("forward_kl", "renormalised_kl"):
        logits = torch.zeros(1, 5, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe")

        def step(name=name, optimizer=optimizer, logits=logits):
            optimizer.zero_grad()
            loss = found(name, support, logits).sum()
            loss.backward()
            return loss

        optimizer.step(step)
        heads[name] = float(logits.softmax(-1)[0, 0].detach())
    assert heads["forward_kl"] == pytest.approx(0.5, abs=1e-4)
    assert heads["renormalised_kl"] == pytest.approx(5 / 7, abs=0.02)


def test_draft_without_probability_in_the_tail_learns_the_tail():
    """It starts with a tail probability below the floor, and converges to p and not to the renormalised p."""
    support = Support(token_ids=torch.tensor([[0, 1]]), probs=torch.tensor([[0.5, 0.3]]), tail=torch.tensor([0.2]))
    logits = torch.tensor([[18.0, 18.0, 0.0, 0.0, 0.0]], requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(1500):
        optimizer.zero_grad()
        found("forward_kl", support, logits).sum().backward()
        optimizer.step()
    expected = torch.tensor([0.5, 0.3, 0.2 / 3, 0.2 / 3, 0.2 / 3])
    torch.testing.assert_close(logits.detach().softmax(-1)[0], expected, rtol=0.02, atol=2e-3)


def test_losses_and_gradients_are_finite_when_the_draft_gives_an_entry_probability_zero():
    support = rows.random_rows("drawn", 4, 10)
    for name in DIVERGENCES:
        if name == "renormalised_kl":
            continue
        logits = torch.zeros(4, 10)
        logits[:, 3] = 200.0
        logits.requires_grad_()
        loss = found(name, support, logits)
        loss.sum().backward()
        assert torch.isfinite(loss).all(), name
        assert torch.isfinite(logits.grad).all(), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "mse"}, r"objective must be one of \['forward_kl', .*\], got objective=mse"),
        ({"name": "jsd", "beta": 1.0}, "beta must be between 0 and 1, got beta=1.0; 0.5 is usual"),
        ({"name": "forward_kl", "label_weight": -0.1}, "label_weight must be between 0 and 1, got label_weight=-0.1"),
    ],
)
def test_values_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_objective(**arguments)


def test_invalid_combinations_are_refused_with_the_reason():
    drawn = target_of(Scheme(name="hybrid", k=0, num_draws=50))
    with pytest.raises(ValueError, match="got objective=renormalised_kl with scheme=hybrid, whose entries were drawn"):
        make_objective("renormalised_kl").check(drawn)
    make_objective("renormalised_kl").check(target_of(Scheme(k=4)))
    with pytest.raises(ValueError, match="objective must be label_nll where the store has no target rows, got obj"):
        make_objective("forward_kl").check(None)
    make_objective("label_nll").check(None)


def test_label_weight_of_1_is_label_nll():
    assert make_objective("forward_kl", label_weight=1.0) == make_objective("label_nll")
