"""The benchmark of other formats: their sizes and values are right, and all are measured in the same way."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks._distributions import inclusion, sampled_loss
from benchmarks._formats import DistillKit, Drawn, ParquetLists, RawNumPy, RsKd, Top, distillkit
from benchmarks._measures import Exact, Seen, angle, compare
from benchmarks._ours import Ours
from benchmarks.bench_store import encoded
from logitstore.dump.scoring import measuring
from logitstore.rows import codec

VOCAB_SIZE = 128256
SMALL = 300


def make_top(num_rows=5, k=128, vocab_size=VOCAB_SIZE):
    rng = np.random.default_rng(0)
    token_ids = np.stack([rng.choice(vocab_size, k, replace=False) for _ in range(num_rows)])
    logprobs = -np.sort(rng.exponential(4.0, (num_rows, k)), axis=-1).astype(np.float32)
    return Top(token_ids, logprobs)


@pytest.fixture(scope="module")
def distributions():
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(64, SMALL, generator=generator)
    draft = logits + torch.randn(64, SMALL, generator=generator)
    return logits.log_softmax(-1), draft.log_softmax(-1)


def stored(distributions, scheme, options):
    ours = Ours.of(scheme, options, SMALL, 64)
    arrays = ours.keep(SimpleNamespace(logprobs=distributions[0], labels=torch.zeros(64, dtype=torch.int64)), 0)
    return codec.decode(arrays, ours.spec), ours


def test_distillkit_rows_have_the_documented_number_of_bytes():
    assert [one.payload_bytes for one in distillkit(VOCAB_SIZE)] == [264, 192, 328]


@pytest.mark.parametrize("one", [*distillkit(VOCAB_SIZE), ParquetLists(k=64), RawNumPy()], ids=lambda one: one.name)
def test_ids_and_exact_logprobs_are_decoded_unchanged(one):
    top = make_top()
    token_ids, logprobs = one.decode(encoded(one, top))
    exact = getattr(one, "exact_k", one.k)
    np.testing.assert_array_equal(np.asarray(token_ids), top.token_ids[:, : one.k])
    found = torch.as_tensor(logprobs)[:, :exact].float().numpy()
    np.testing.assert_allclose(found, top.logprobs[:, :exact], rtol=2.0**-8)


def test_inexact_logprobs_of_distillkit_equal_the_least_squares_fit():
    top = make_top(k=32)
    one = DistillKit(name="line", vocab_size=VOCAB_SIZE, k=32, exact_k=4, terms=(0, 1, "sqrt"))
    ranks = np.arange(28.0)
    design = np.stack([np.ones(28), ranks, np.sqrt(ranks)], axis=-1)
    values = top.logprobs[:, 4:].astype(np.float64).T
    wanted = design @ np.linalg.lstsq(design, values, rcond=None)[0]
    found = one.decode(one.encode(top, [2, 3]))[1][:, 4:]
    np.testing.assert_allclose(found.numpy(), wanted.T, atol=1e-4)


def test_rskd_draws_take_three_bytes_and_are_decoded_unchanged():
    drawn = Drawn(np.array([2, 1]), np.array([5, 131071, 7]), np.array([49, 1, 50]))
    data = RsKd().encode(drawn)
    assert len(data) == 2 + 3 * 3
    for found, wanted in zip(RsKd().decode(data, 2), drawn, strict=True):
        np.testing.assert_array_equal(found, wanted)
    with pytest.raises(ValueError, match="ids must be below 2\\*\\*17"):
        RsKd().encode(Drawn(np.array([1]), np.array([131072]), np.array([50])))


@pytest.mark.parametrize(
    ("scheme", "options"),
    [("topk", {"k": 20}), ("nucleus", {"k": 64, "mass": 0.9}), ("sample", {"num_draws": 50}),
     ("hybrid", {"num_draws": 20})],
)  # fmt: skip
def test_benchmark_measures_our_schemes_as_the_dump_does(distributions, scheme, options):
    rows, ours = stored(distributions, scheme, options)
    exact, draft = (measuring.Exact(rows=np.arange(64), logprobs=values) for values in distributions)
    wanted = measuring.measure_target(exact, exact, rows, ours.spec) | measuring.measure_losses(exact, draft, rows)
    values, gradient = compare(Exact.of(*distributions), Seen.of_rows(rows, 0, 64))
    for name, own in (
        ("kl_codes", "kl_codes"), ("tv_draws", "tv"), ("mass", "mass"), ("alpha", "alpha_exact"),
        ("alpha_estimate", "alpha"), ("alpha_error", "alpha_error"), ("angle_row", "angle_row"),
    ):  # fmt: skip
        if own in values:
            assert values[own].sum().item() == pytest.approx(wanted[name], rel=2e-4, abs=2e-4), name
    if scheme in ("topk", "nucleus"):
        assert values["kl_tail"].sum().item() == pytest.approx(wanted["kl_tail"], rel=1e-4)
    full = Exact.of(*distributions).gradient()
    assert angle(gradient, full) == pytest.approx(wanted["angle_shard"], abs=0.02)


def test_truncated_formats_are_measured_after_renormalisation(distributions):
    logprobs, draft = distributions
    values, token_ids = logprobs.topk(20, dim=-1)
    found, gradient = compare(Exact.of(logprobs, draft), Seen.of_truncated(token_ids, values))
    logits = draft.clone().requires_grad_()
    weights = values.double().softmax(-1)
    (-(weights * logits.double().log_softmax(-1).gather(1, token_ids)).sum()).backward()
    np.testing.assert_allclose(gradient.numpy(), logits.grad.sum(0).numpy(), atol=1e-4)
    full = (draft.exp() - logprobs.exp()).double()
    cosine = torch.nn.functional.cosine_similarity(full, logits.grad.double(), dim=-1)
    np.testing.assert_allclose(found["angle_row"].numpy(), torch.rad2deg(cosine.acos()).numpy(), atol=0.02)
    np.testing.assert_allclose(found["kl_tail"].numpy(), -values.exp().sum(-1).log().numpy(), atol=1e-5)
    assert found["kl_codes"].abs().max() < 1e-6


def test_sampled_loss_with_all_tokens_is_exact():
    generator = torch.Generator().manual_seed(0)
    hidden, weights = torch.randn(6, 8, generator=generator), torch.randn(40, 8, generator=generator)
    labels = torch.arange(6)
    all_drawn = torch.ones(40, dtype=torch.bool)
    found = sampled_loss(hidden, labels, weights, all_drawn, torch.ones(40))
    assert found.item() == pytest.approx(torch.nn.functional.cross_entropy(hidden @ weights.T, labels).item(), rel=1e-5)
    chances = inclusion(torch.arange(1000) % 300, 200)
    assert chances.max() <= 1
    assert chances.sum().item() == pytest.approx(200, rel=0.01)
