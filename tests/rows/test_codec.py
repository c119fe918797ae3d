"""Properties of the encoding of rows: ids as gaps, codes of logprobs, the likeliest entry, weights.

Rows are made here in float64 from the definitions of the schemes, without the dump's code.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from logitstore import Rows
from logitstore.errors import FormatError
from logitstore.format.codebook import LEVELS, Codebook
from logitstore.format.schemes import Scheme
from logitstore.format.spec import TargetSpec, from_json, to_json
from logitstore.rows import codec
from tests.helpers import stores
from tests.helpers.encoding import encode_rows

LARGEST_ID = 2**32 - 1
IDS = st.one_of(st.integers(0, 40), st.integers(0, LARGEST_ID), st.integers(LARGEST_ID - 40, LARGEST_ID))
ROWS_OF_IDS = st.lists(st.sets(IDS, max_size=9).map(sorted), max_size=12)
SEEDS = st.integers(0, 2**32 - 1)
SCHEMES = st.one_of(
    st.integers(1, 64).map(lambda k: Scheme(k=k)),
    st.floats(0.1, 1.0).map(lambda mass: Scheme(name="nucleus", k=64, mass=mass, k_min=2)),
    st.integers(2, 200).map(lambda n: Scheme(name="sample", k=0, num_draws=n)),
    st.integers(2, 200).map(lambda n: Scheme(name="hybrid", k=0, num_draws=n)),
)
EXPONENTS = st.sampled_from([2.0, 3.0, 4.0, 4.0, 8.0, 16.0])
FIXED = settings(max_examples=150, deadline=None, derandomize=True, database=None)


def spec_of(scheme, exponent=4.0):
    return TargetSpec(model=stores.MODEL, scheme=scheme, codebook=Codebook(exponent=exponent))


def flat(rows):
    """Returns rows of ids as two arrays: counts and ids."""
    return np.array([len(row) for row in rows], np.int64), np.array([i for row in rows for i in row], np.uint32)


@given(ROWS_OF_IDS)
@example([])
@example([[], [LARGEST_ID], [], [0], []])
@example([[0, LARGEST_ID], [0, 1], [LARGEST_ID - 1, LARGEST_ID], []])
@FIXED
def test_gaps_of_any_ids_decode_to_the_same_ids(rows):
    counts, ids = flat(rows)
    gaps = codec.gaps(ids, counts.astype(np.uint16))
    assert gaps.dtype == np.uint32
    np.testing.assert_array_equal(codec.ungap(gaps, counts), ids)
    assert codec.last_ids(gaps, counts.astype(np.uint16)).tolist() == [row[-1] for row in rows if row]
    expected = [i if place == 0 else i - row[place - 1] - 1 for row in rows for place, i in enumerate(row)]
    assert gaps.tolist() == expected


@given(st.lists(st.lists(IDS, max_size=9), max_size=12))
@FIXED
def test_arbitrary_gaps_decode_to_rising_ids_without_overflow(rows):
    """Sums beyond 32 bits do not wrap around, so that checking the last id of a row checks all its ids."""
    counts, gaps = flat(rows)
    ids, last = codec.ungap(gaps, counts), codec.last_ids(gaps, counts)
    start = 0
    for row, most in zip([row for row in rows if row], last, strict=True):
        found = ids[start : start + len(row)].tolist()
        assert found == [sum(row[: i + 1]) + i for i in range(len(row))]
        assert found[-1] == most
        start += len(row)


def distribution(rng, vocab_size):
    """Returns probabilities between nearly uniform and nearly one-hot, sometimes with ties and zeros."""
    p = rng.dirichlet(np.full(vocab_size, 10.0 ** rng.uniform(-2.5, 1.5)))
    if rng.random() < 0.3:
        p = np.rint(p * 2 * vocab_size)
    p[rng.integers(vocab_size)] += 1e-3
    return p / p.sum()


def keep(rng, p, spec):
    """Returns the ids that a row keeps, in rising order, and their weights; None for schemes without weights."""
    scheme = spec.scheme
    order = np.argsort(-p, kind="stable")
    if scheme.name == "sample":
        drawn, num = np.unique(rng.choice(len(p), scheme.num_draws, p=p), return_counts=True)
        return drawn, num / scheme.num_draws
    if scheme.name == "hybrid":
        is_likely = spec.codebook.encode(logprob(p)) <= spec.last_exact_code
        ends = np.cumsum(np.where(is_likely, 0.0, p))
        marks = np.arange(1 - rng.random(), ends[-1] / spec.step + 1) * spec.step
        drawn = np.unique(np.searchsorted(ends, marks[marks <= ends[-1]]))
        ids = np.sort(np.append(np.flatnonzero(is_likely), drawn))
        return ids, np.where(is_likely[ids], p[ids], spec.step)
    num = scheme.k
    if scheme.name == "nucleus":
        num = max(int(np.searchsorted(np.cumsum(p[order]), scheme.mass)) + 1, scheme.k_min)
    return np.sort(order[: min(num, scheme.k)]), None


def logprob(p):
    with np.errstate(divide="ignore"):
        return np.log(p).astype(np.float32)


def make_rows(rng, spec, num_rows):
    """Returns rows over vocabularies of 1 to 299 tokens. About a quarter of the rows do not count."""
    counts, ids, logprobs, weights, tail = [], [], [], [], []
    mask = rng.random(num_rows) < 0.75
    for counted in mask:
        if not counted:
            counts.append(0)
            tail.append(np.nan)
            continue
        p = distribution(rng, int(rng.integers(1, 300)))
        kept, stands_for = keep(rng, p, spec)
        counts.append(len(kept))
        ids.extend(kept)
        logprobs.extend(logprob(p[kept]))
        weights.extend([] if stands_for is None else stands_for)
        tail.append(np.delete(p, kept).sum())
    nothing = np.where(mask, -1.0, np.nan).astype(np.float32)
    return Rows(
        counts=np.array(counts, np.int64), token_ids=np.array(ids, np.uint32),
        logprobs=np.array(logprobs, np.float32),
        weights=np.array(weights, np.float32) if spec.scheme.draws else None,
        tail_mass=np.array(tail, np.float32), label_logprob=nothing, entropy=-nothing,
    )  # fmt: skip


def rows_of(rows):
    """Returns (first entry, end) of each row that has entries."""
    return [(a, b) for a, b in zip(rows.offsets[:-1], rows.offsets[1:], strict=True) if b > a]


@given(SEEDS, SCHEMES, EXPONENTS)
@FIXED
def test_ids_draws_and_weights_are_decoded_unchanged(seed, scheme, exponent):
    spec = spec_of(scheme, exponent)
    rows = make_rows(np.random.default_rng(seed), spec, 12)
    arrays = encode_rows(rows, spec)
    decoded = codec.decode(arrays, spec)
    np.testing.assert_array_equal(decoded.counts, rows.counts)
    np.testing.assert_array_equal(decoded.token_ids, rows.token_ids)
    assert rows.counts.max(initial=0) <= spec.room
    assert (decoded.weights is None) == (not scheme.draws)
    if scheme.name == "sample":
        np.testing.assert_array_equal(arrays["draws"], np.rint(rows.weights * scheme.num_draws))
        np.testing.assert_allclose(decoded.weights, rows.weights, rtol=2e-7)
        assert arrays["draws"].sum() == scheme.num_draws * (rows.counts > 0).sum()
    else:
        assert not arrays["draws"].any()
    if scheme.name == "hybrid":
        was_drawn = rows.weights == np.float32(spec.step)
        np.testing.assert_array_equal(arrays["logprobs"] > spec.last_exact_code, was_drawn)
        np.testing.assert_array_equal(decoded.weights[was_drawn], rows.weights[was_drawn])
        np.testing.assert_array_equal(decoded.weights[~was_drawn], np.exp(decoded.logprobs[~was_drawn]))


@given(SEEDS, SCHEMES, EXPONENTS)
@FIXED
def test_codes_are_nearest_and_the_likeliest_entry_has_a_unique_code(seed, scheme, exponent):
    spec = spec_of(scheme, exponent)
    rows = make_rows(np.random.default_rng(seed), spec, 12)
    arrays = encode_rows(rows, spec)
    decoded, codes = codec.decode(arrays, spec), arrays["logprobs"].astype(int)
    table = spec.codebook.table.astype(float)
    for first, end in rows_of(rows):
        true, found = rows.logprobs[first:end], codes[first:end]
        # Clamped, because a logprob below the last code may be -inf.
        distance = np.abs(np.maximum(true, table[-1])[:, None] - table)
        nearest = spec.codebook.encode(true).astype(int)
        assert (distance[np.arange(len(true)), nearest] <= distance.min(1) + 1e-5).all()
        shares = (nearest == nearest.min()) & (true < true.max())
        moved = shares & (nearest != spec.last_exact_code) & (nearest != LEVELS - 1)
        np.testing.assert_array_equal(found, nearest + moved)
        likeliest = true[decoded.logprobs[first:end].argmax()]
        if nearest.min() not in (spec.last_exact_code, LEVELS - 1):
            assert likeliest == true.max()
        assert spec.codebook.encode(likeliest) == nearest.min()


@given(SEEDS, SCHEMES, EXPONENTS)
@FIXED
def test_kept_probabilities_and_tail_sum_to_one(seed, scheme, exponent):
    spec = spec_of(scheme, exponent)
    rows = make_rows(np.random.default_rng(seed), spec, 12)
    decoded = codec.decode(encode_rows(rows, spec), spec)
    sums = [np.exp(decoded.logprobs[first:end].astype(float)).sum() for first, end in rows_of(rows)]
    total = np.array(sums) + decoded.tail_mass[rows.counts > 0].astype(float)
    assert (np.abs(total - 1) < 1e-3).all()
    assert (total <= 1 + 1e-6).all()
    assert np.isnan(decoded.tail_mass[rows.counts == 0]).all()
    moved = np.abs(decoded.tail_mass - rows.tail_mass)[rows.counts > 0]
    assert (moved <= 2.0**-8 / np.e + 1e-6).all()


@given(SEEDS, SCHEMES, EXPONENTS)
@FIXED
def test_decoded_bounds_contain_the_encoded_values(seed, scheme, exponent):
    spec = spec_of(scheme, exponent)
    rows = make_rows(np.random.default_rng(seed), spec, 12)
    least, most = codec.decode_bounds(encode_rows(rows, spec), spec.codebook)
    np.testing.assert_array_equal(least.token_ids, rows.token_ids)
    assert (least.logprobs <= rows.logprobs).all()
    assert (rows.logprobs <= most.logprobs).all()
    counted = rows.counts > 0
    assert (least.tail_mass <= rows.tail_mass * (1 + 1e-6))[counted].all()
    assert (rows.tail_mass <= most.tail_mass * (1 + 1e-6))[counted].all()


@given(st.floats(1.0, 16.0), st.integers(2, 2**12))
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
def test_step_of_hybrid_is_the_boundary_between_two_codes(exponent, num_draws):
    scheme = Scheme(name="hybrid", k=0, num_draws=num_draws)
    book = Codebook(exponent=exponent)
    if book.code_at(1 / num_draws) == LEVELS - 1:
        with pytest.raises(ValueError, match=f"num_draws must be smaller with exponent=.*got num_draws={num_draws};"):
            TargetSpec(model=stores.MODEL, scheme=scheme, codebook=book)
        return
    spec = TargetSpec(model=stores.MODEL, scheme=scheme, codebook=book)
    assert 0 < spec.step <= (1 + 1e-6) / num_draws
    assert spec.room == int(1 / spec.step) + 1 >= num_draws
    at_step = np.float32(np.log(spec.step))
    ends = book.encode(np.array([at_step * np.float32(1 - 1e-6), at_step * np.float32(1 + 1e-6)], np.float32))
    assert ends.tolist() == [spec.last_exact_code, spec.last_exact_code + 1]


def test_stored_hybrid_spec_without_a_code_below_its_step_is_refused():
    """Without such a code, drawn entries could not be told from exact ones."""
    value = to_json(spec_of(Scheme(name="hybrid", k=0, num_draws=400)))
    value["codebook"] = {"exponent": 1}
    with pytest.raises(FormatError, match=re.escape("num_draws must be smaller with exponent=1.0")):
        from_json(TargetSpec, value, "target")


def test_equally_unlikely_entries_share_the_last_code():
    """Codes end at 255, so the likeliest of these entries cannot have a code of its own."""
    spec = spec_of(Scheme(name="hybrid", k=0, num_draws=100), exponent=1.0)
    logprobs = np.log(np.linspace(1e-4, 1.1e-4, 5)).astype(np.float32)
    one = np.zeros(1, np.float32)
    rows = Rows(
        counts=np.array([5]), token_ids=np.arange(5, dtype=np.uint32), logprobs=logprobs,
        weights=np.full(5, spec.step, np.float32), tail_mass=one + np.float32(0.999), label_logprob=one, entropy=one,
    )  # fmt: skip
    assert encode_rows(rows, spec)["logprobs"].tolist() == [255] * 5
    assert (codec.decode(encode_rows(rows, spec), spec).weights == np.float32(spec.step)).all()


def test_exact_entries_are_never_given_a_code_of_drawn_entries():
    """Tokens just above the step share the last exact code: the next one would mark an entry as drawn."""
    spec = spec_of(Scheme(name="hybrid", k=0, num_draws=20))
    p = spec.step * np.linspace(1.001, 1.02, 15)
    one = np.zeros(1, np.float32)
    rows = Rows(
        counts=np.array([15]), token_ids=np.arange(15, dtype=np.uint32), logprobs=logprob(p),
        weights=p.astype(np.float32), tail_mass=(one + 1 - p.sum()).astype(np.float32), label_logprob=one, entropy=one,
    )  # fmt: skip
    arrays = encode_rows(rows, spec)
    assert arrays["logprobs"].tolist() == [spec.last_exact_code] * 15
    np.testing.assert_allclose(codec.decode(arrays, spec).weights, p, rtol=0.05)


def test_rows_without_entries_are_decoded_unchanged():
    for scheme in (Scheme(k=4), Scheme(name="sample", k=0, num_draws=4), Scheme(name="hybrid", k=0, num_draws=4)):
        spec = spec_of(scheme)
        nothing = np.full(3, np.nan, np.float32)
        empty = np.zeros(0, np.float32)
        rows = Rows(
            counts=np.zeros(3, np.int64), token_ids=empty.astype(np.uint32), logprobs=empty,
            weights=empty if scheme.draws else None, tail_mass=nothing, label_logprob=nothing, entropy=nothing,
        )  # fmt: skip
        decoded = codec.decode(encode_rows(rows, spec), spec)
        for field in dataclasses.fields(Rows):
            np.testing.assert_array_equal(getattr(decoded, field.name), getattr(rows, field.name))


@pytest.mark.parametrize("scheme", [Scheme(k=6), Scheme(name="sample", k=0, num_draws=20),
                                    Scheme(name="hybrid", k=0, num_draws=20)], ids=str)  # fmt: skip
@pytest.mark.parametrize("exponent", [1.0, 4.0])
def test_dump_and_codec_encode_to_the_same_bytes(scheme, exponent):
    """The dump encodes on the device, the codec encodes rows on the CPU."""
    import torch

    from logitstore.dump.scoring.truncation import truncate, uniforms

    spec = spec_of(scheme, exponent)
    # Includes near ties, and distributions so flat that all entries have the last code.
    scale = torch.logspace(-3, 1, 400)[:, None]
    logits = torch.randn(400, 300, generator=torch.Generator().manual_seed(0)) * scale
    uniform = torch.from_numpy(uniforms(spec, 0, 400))
    kept = truncate(
        logits, torch.zeros(400, dtype=torch.long), spec, torch.from_numpy(spec.codebook.boundaries), uniform
    )
    used = kept.token_ids < 300
    logprobs = logits.log_softmax(-1).gather(1, kept.token_ids.long().clamp_max(299))[used].numpy()
    rows = Rows(
        counts=kept.counts.numpy().astype(np.int64), token_ids=kept.token_ids[used].numpy().astype(np.uint32),
        logprobs=logprobs,
        weights=(kept.draws[used].numpy() / np.float32(20)).astype(np.float32) if scheme.draws else None,
        tail_mass=kept.tail.exp().numpy(), label_logprob=kept.label_logprob.numpy(), entropy=kept.entropy.numpy(),
    )  # fmt: skip
    arrays = encode_rows(rows, spec)
    np.testing.assert_array_equal(arrays["logprobs"], kept.codes[used].numpy())
    np.testing.assert_array_equal(arrays["draws"], kept.draws[used].numpy())
    if exponent == 1.0:
        assert (arrays["logprobs"] == LEVELS - 1).any()
    if scheme.name == "hybrid":
        # Only drawn ids have codes above the last exact one.
        is_likely = -logprobs <= spec.codebook.boundaries[spec.last_exact_code]
        np.testing.assert_array_equal(arrays["logprobs"] <= spec.last_exact_code, is_likely)
