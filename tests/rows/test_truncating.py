"""A store read with a smaller scheme equals a dump with that scheme, up to the coding error."""

from __future__ import annotations

import copy
import pickle
import re
import tracemalloc

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

import logitstore
from logitstore.dump.scoring.truncation import truncate, uniforms
from logitstore.errors import IdentityError, LayerNotFoundError
from logitstore.format import schemes
from logitstore.format.schemes import Scheme
from logitstore.format.spec import TargetSpec
from logitstore.rows import codec, truncating
from logitstore.rows.codec import MANTISSA_BITS, round_mantissa
from tests.helpers import stores
from trainer.data.dataset import DocumentDataset
from trainer.evaluation.from_cache import cached_acceptance

V = 96
SCHEMES = {
    "topk": Scheme(k=40),
    "nucleus": Scheme(name="nucleus", k=40, mass=0.95, k_min=5),
}


def spec_of(scheme):
    return TargetSpec(model=stores.MODEL, scheme=scheme)


def dumped(logits, scheme, masked=0):
    """Returns stored arrays of rows as the dump writes them, with `masked` rows that do not count before them."""
    spec = spec_of(scheme)
    labels, none = torch.zeros(len(logits), dtype=torch.int64), torch.from_numpy(uniforms(spec, 0, len(logits)))
    found = truncate(torch.from_numpy(logits), labels, spec, torch.from_numpy(spec.codebook.boundaries), none)
    counts = np.concatenate([np.zeros(masked, np.uint16), found.counts.numpy().astype(np.uint16)])
    used = np.arange(spec.room) < found.counts.numpy()[:, None]
    floats = {
        name: np.concatenate([np.full(masked, np.nan, np.float32), getattr(found, name).numpy()])
        for name in ("tail", "label_logprob", "entropy")
    }
    return {
        "counts": counts,
        "gaps": codec.gaps(found.token_ids.numpy()[used], counts),
        "logprobs": found.codes.numpy()[used],
        "draws": np.zeros(int(counts.sum()), np.uint16),
        **{name: round_mantissa(values, MANTISSA_BITS) for name, values in floats.items()},
    }


def seen(arrays, stored, scheme):
    """Returns the rows of a view, and a mask of the stored entries that it keeps."""
    rows = codec.decode(arrays, spec_of(stored))
    chosen = truncating.kept(rows, arrays["logprobs"], spec_of(stored), scheme)
    return truncating.drop(rows, chosen), chosen


def random_logits(seed, num_rows, sharpness, levels):
    """Returns random logits. With `levels` they have only so many values, and many tokens are equally likely."""
    rng = np.random.default_rng(seed)
    values = rng.normal(0, sharpness, (num_rows, V))
    if levels:
        values = rng.choice(rng.normal(0, sharpness, levels), (num_rows, V))
    return values.astype(np.float32)


def tolerance(logits, schemes):
    """Returns p, and the error of a sum of entries of each row from coding and from scaling the row to 1."""
    p = torch.from_numpy(logits).double().softmax(-1).numpy()
    book = spec_of(schemes).codebook
    steps = stores.max_errors(book)[book.encode(np.log(np.maximum(p, 1e-30)).astype(np.float32))]
    # A shared code is raised by one, which adds two half steps. The log of the tail has 7 bits.
    return p, 4 * (p * steps).sum(-1) + 2.0**-MANTISSA_BITS * 0.4 + 1e-4


def needed(rows, scheme, mass):
    """Returns the size of the nucleus of each row by its decoded probabilities, computed in float64."""
    row, there = np.repeat(np.arange(len(rows)), rows.counts), rows.counts > 0
    probs = np.exp(rows.logprobs.astype(np.float64))
    probs = probs[np.lexsort((-probs, row))]
    before = np.cumsum(probs) - probs
    before -= np.repeat(before[rows.offsets[:-1][there]], rows.counts[there])
    num = np.bincount(row[before < mass], minlength=len(rows))
    return np.minimum(np.maximum(num, scheme.k_min), np.minimum(rows.counts, scheme.k))


def assert_as_needed(counts, rows, scheme):
    """Checks the sizes of nuclei. Sums in float32 may differ by 1e-5, which changes the size of very few rows."""
    fewest, most = (needed(rows, scheme, scheme.mass + slack) for slack in (-1e-5, 1e-5))
    assert ((fewest <= counts) & (counts <= most)).all()
    assert (fewest == most).mean() > 0.98


shapes = given(
    seed=st.integers(0, 2**32 - 1),
    num_rows=st.integers(1, 6),
    masked=st.integers(0, 3),
    sharpness=st.sampled_from([0.1, 1.0, 3.0, 9.0]),
    levels=st.sampled_from([0, 0, 2, 9]),
    k=st.integers(1, 40),
    mass=st.floats(0.05, 0.95),
    k_min=st.integers(1, 5),
)


@pytest.mark.parametrize("name", SCHEMES)
@settings(max_examples=150, deadline=None, derandomize=True)
@shapes
def test_view_equals_a_dump_with_the_smaller_scheme(name, seed, num_rows, masked, sharpness, levels, k, mass, k_min):
    stored = SCHEMES[name]
    scheme = Scheme(name="nucleus", k=k, mass=mass, k_min=min(k, k_min))
    logits = random_logits(seed, num_rows, sharpness, levels)
    arrays, wanted = dumped(logits, stored, masked), dumped(logits, scheme, masked)
    rows, chosen = seen(arrays, stored, scheme)
    small, whole = codec.decode(wanted, spec_of(scheme)), codec.decode(arrays, spec_of(stored))
    p, slack = tolerance(logits, scheme)
    assert (rows.counts[:masked] == 0).all()
    assert np.isnan(rows.tail_mass[:masked]).all()
    np.testing.assert_array_equal(rows.logprobs, whole.logprobs[chosen])
    for i in range(num_rows):
        row, other = (part.slice(masked + i, masked + i + 1) for part in (rows, small))
        most_likely = np.sort(p[i])[::-1]
        n = int(row.counts[0])
        assert scheme.k_min <= n <= scheme.k
        assert (np.diff(row.token_ids.astype(int)) > 0).all()
        # Up to the coding error, the last entry is the one that reaches the mass.
        if n < scheme.k:
            assert most_likely[:n].sum() >= scheme.mass - slack[i]
        if n > scheme.k_min:
            assert most_likely[: n - 1].sum() < scheme.mass + slack[i]
        if n == int(other.counts[0]):
            np.testing.assert_allclose(
                np.sort(np.exp(row.logprobs)), np.sort(np.exp(other.logprobs)), atol=slack[i], rtol=0
            )
            assert abs(float(row.tail_mass[0]) - float(other.tail_mass[0])) <= slack[i]
        assert np.exp(row.logprobs.astype(float)).sum() + float(row.tail_mass[0]) == pytest.approx(1, abs=2e-6)
        assert row.label_logprob[0] == whole.label_logprob[masked + i]
        assert row.entropy[0] == whole.entropy[masked + i]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1), sharpness=st.sampled_from([0.1, 1.0, 9.0]), levels=st.sampled_from([0, 3]),
    k=st.integers(1, 40), size=st.integers(1, 40),
)  # fmt: skip
def test_smaller_top_k_of_a_top_k_has_the_codes_of_its_own_dump(seed, sharpness, levels, k, size):
    k, size = sorted((k, size))
    logits = random_logits(seed, 4, sharpness, levels)
    arrays, wanted = dumped(logits, Scheme(k=size)), dumped(logits, Scheme(k=k))
    rows, chosen = seen(arrays, Scheme(k=size), Scheme(k=k))
    assert (rows.counts == k).all()
    codes = [np.sort(part.reshape(4, k), axis=1) for part in (arrays["logprobs"][chosen], wanted["logprobs"])]
    np.testing.assert_array_equal(*codes)


@shapes
@settings(max_examples=60, deadline=None, derandomize=True)
def test_bounds_of_a_view_contain_the_exact_probabilities(seed, num_rows, masked, sharpness, levels, k, mass, k_min):
    logits = random_logits(seed, num_rows, sharpness, levels)
    stored, scheme = SCHEMES["topk"], Scheme(name="nucleus", k=k, mass=mass, k_min=min(k, k_min))
    arrays = dumped(logits, stored, masked)
    _, chosen = seen(arrays, stored, scheme)
    least, most = (truncating.drop(rows, chosen) for rows in codec.decode_bounds(arrays, spec_of(stored).codebook))
    p = torch.from_numpy(logits).double().softmax(-1).numpy()
    for i in range(num_rows):
        low, high = (rows.slice(masked + i, masked + i + 1) for rows in (least, most))
        exact = p[i, low.token_ids]
        assert (np.exp(low.logprobs) <= exact + 1e-6).all()
        assert (exact <= np.exp(high.logprobs) + 1e-6).all()
        assert low.tail_mass[0] - 1e-6 <= 1 - exact.sum() <= high.tail_mass[0] + 1e-6


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("sharpness", [0.1, 1.0, 3.0])
def test_nucleus_of_a_view_ends_when_decoded_probabilities_reach_the_mass(name, sharpness):
    arrays = dumped(random_logits(0, 300, sharpness, 0), SCHEMES[name], masked=2)
    whole = codec.decode(arrays, spec_of(SCHEMES[name]))
    for mass in (0.2, 0.3, 0.6, 0.9):
        scheme = Scheme(name="nucleus", k=38, mass=mass, k_min=2)
        assert_as_needed(seen(arrays, SCHEMES[name], scheme)[0].counts, whole, scheme)


def test_memory_of_a_view_grows_with_entries_and_not_with_the_widest_row():
    rng = np.random.default_rng(0)
    counts = rng.permutation(np.repeat([0, 1, 7, 8, 4096], [200, 50, 500, 15633, 1])).astype(np.uint16)
    floats = np.where(counts, np.float32(-2.0), np.float32(np.nan))
    arrays = {"counts": counts, "gaps": rng.integers(0, 9, counts.sum(), np.uint32)}
    arrays |= {"logprobs": rng.integers(90, 256, counts.sum(), np.uint8)}
    arrays |= dict.fromkeys(("tail", "label_logprob", "entropy"), floats)
    stored = Scheme(k=4096)
    whole = codec.decode(arrays, spec_of(stored))
    row = np.repeat(np.arange(len(counts)), counts)
    ranks = np.empty(len(row), np.int64)
    ranks[np.lexsort((arrays["logprobs"], row))] = np.arange(len(row)) - whole.offsets[row]
    for scheme in (Scheme(k=5), Scheme(name="nucleus", k=4096, mass=0.5)):
        tracemalloc.start()
        rows, chosen = seen(arrays, stored, scheme)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 64 * len(row)  # bytes; decoding alone takes 33 bytes per entry
        np.testing.assert_array_equal(chosen, ranks < rows.counts[row])
        assert_as_needed(rows.counts, whole, scheme)


def test_among_entries_with_equal_codes_the_smallest_ids_are_kept():
    logits = np.full((1, V), -8.0, np.float32)
    logits[0, [70, 3, 20, 41]] = [4.0, 1.0, 1.0, 1.0]
    rows, _ = seen(dumped(logits, Scheme(k=10)), Scheme(k=10), Scheme(k=3))
    assert rows.token_ids.tolist() == [3, 20, 70]


def test_nucleus_of_the_stored_mass_keeps_the_stored_counts_up_to_k():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (300, V)).astype(np.float32)
    stored = Scheme(name="nucleus", k=40, mass=0.9, k_min=4)
    arrays = dumped(logits, stored)
    rows, _ = seen(arrays, stored, Scheme(name="nucleus", k=12, mass=0.9, k_min=4))
    np.testing.assert_array_equal(rows.counts, np.minimum(arrays["counts"], 12))


@pytest.mark.parametrize(
    ("stored", "scheme", "message"),
    [
        (Scheme(k=8), Scheme(k=9), "k must be at most 8, which the store keeps, got k=9; omit scheme"),
        (
            SCHEMES["nucleus"],
            Scheme(k=6),
            "k must be at most 5, the k_min of the stored nucleus, got topk with k=6 (some rows hold no more",
        ),
        (
            SCHEMES["nucleus"],
            Scheme(name="nucleus", k=8, mass=0.97, k_min=5),
            "mass must be at most 0.95, the mass of the stored nucleus, got mass=0.97; omit",
        ),
        (
            SCHEMES["nucleus"],
            Scheme(name="nucleus", k=8, mass=0.9, k_min=6),
            "k_min must be at most 5, the k_min of the stored nucleus, got k_min=6; omit",
        ),
        (
            Scheme(name="hybrid", k=0, num_draws=50),
            Scheme(k=4),
            "stored rows must be topk or nucleus to read fewer entries of each row, got hybrid, num_draws 50, seed 0",
        ),
        (
            Scheme(k=8),
            Scheme(name="sample", k=0, num_draws=50),
            "scheme must be topk or nucleus to read fewer entries of each row, got sample, num_draws 50, seed 0",
        ),
    ],
    ids=lambda value: None if isinstance(value, Scheme) else value[:12],
)
def test_scheme_that_needs_more_than_the_stored_rows_is_refused(stored, scheme, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        schemes.check_smaller(stored, scheme)


def test_top_k_up_to_k_min_can_be_read_from_a_nucleus():
    schemes.check_smaller(SCHEMES["nucleus"], Scheme(k=5))


def test_view_reports_its_scheme_and_the_stored_one(tiny_store):
    whole, view = logitstore.open(tiny_store), logitstore.open(tiny_store, scheme=Scheme(k=4))
    assert view.spec.target.scheme == Scheme(k=4)
    assert whole.spec.target.scheme == Scheme(k=16)
    assert repr(view).startswith(f"<Store {tiny_store} read as topk, k 4 (stored: topk, k 16): 24 documents, ")
    assert " read as " not in repr(whole)
    assert list(view.layers) == ["tokens", "target"]
    for other in (view, pickle.loads(pickle.dumps(view)), copy.deepcopy(view)):
        mask = whole[5].loss_mask
        np.testing.assert_array_equal(other[5].rows.counts, np.where(mask, 4, 0))
        np.testing.assert_array_equal(other.shard(0).rows.token_ids, whole_topk(whole.shard(0).rows, 4))
    assert whole[5].rows.counts.max() == 16
    assert logitstore.verify(view) == []
    assert logitstore.open(tiny_store, scheme=Scheme(k=16)).spec == whole.spec


def whole_topk(rows, k):
    """Returns the ids of the k likeliest entries of each row, sorted by id."""
    parts = [rows.slice(i, i + 1) for i in np.flatnonzero(rows.counts)]
    chosen = [np.sort(part.token_ids[np.argsort(-part.logprobs, kind="stable")[:k]]) for part in parts]
    return np.concatenate(chosen)


def test_view_of_a_view_is_made_from_the_stored_rows(tiny_store):
    store = logitstore.open(tiny_store)
    view = store.read_as(Scheme(k=4))
    assert view.read_as(Scheme(k=4)) is view
    for narrow in (view, pickle.loads(pickle.dumps(view)), view.read_as(Scheme(k=2))):
        wider = narrow.read_as(Scheme(k=8))
        assert repr(wider) == repr(store.read_as(Scheme(k=8)))
        np.testing.assert_array_equal(wider.shard(0).rows.token_ids, whole_topk(store.shard(0).rows, 8))
        assert narrow.read_smaller(k=None, mass=0.9).spec == store.read_smaller(k=None, mass=0.9).spec
        with pytest.raises(ValueError, match="k must be at most 16, which the store keeps, got k=17"):
            narrow.read_as(Scheme(k=17))
        whole = narrow.read_as(Scheme(k=16))
        assert (repr(whole), whole.spec) == (repr(store), store.spec)
        np.testing.assert_array_equal(whole.loss("reference")[5], store.loss("reference")[5])
        np.testing.assert_array_equal(whole[5].rows.logprobs, store[5].rows.logprobs)
        assert list(narrow.layers) == ["tokens", "target"]


def test_losses_of_a_view_are_refused(tiny_store):
    view = logitstore.open(tiny_store).read_smaller(k=None, mass=0.8)
    expected = (
        r"losses must be computed on the rows that are read, got reference on rows with topk, k 16, but the store is "
        r"read as nucleus, k 16, mass 0\.8, k_min 4; read the store as it is, or dump target and losses with the "
        r"smaller"
    )
    with pytest.raises(IdentityError, match=expected):
        view.loss("reference")
    with pytest.raises(IdentityError, match=expected):
        view.gap("reference", "reference")
    with pytest.raises(IdentityError, match=expected):
        DocumentDataset([view], columns=["reference_ce"], losses={"reference_ce": "reference"})
    assert DocumentDataset([view]).document(0, 0).rows.counts.max() <= 16


def test_k_and_mass_select_a_view(tiny_store):
    store = logitstore.open(tiny_store)
    assert store.read_smaller(k=None, mass=None) is store
    assert store.read_smaller(k=3, mass=None).spec.target.scheme == Scheme(k=3)
    nucleus = store.read_smaller(k=None, mass=0.9)
    assert nucleus.spec.target.scheme == Scheme(name="nucleus", k=16, mass=0.9, k_min=4)
    assert store.read_smaller(k=2, mass=0.9).spec.target.scheme == Scheme(name="nucleus", k=2, mass=0.9, k_min=2)
    with pytest.raises(ValueError, match="k must be at most 16, which the store keeps, got k=17"):
        store.read_smaller(k=17, mass=None)
    with pytest.raises(ValueError, match="k must be between 1 and 65535, got k=0"):
        store.read_smaller(k=0, mass=None)


def test_view_of_a_store_without_a_target_is_refused(tiny_store, tmp_path):
    url = stores.copy(tiny_store, tmp_path / "cache.zarr")
    (tmp_path / "cache.zarr" / "target" / "zarr.json").unlink()
    with pytest.raises(LayerNotFoundError, match="store must have a target layer, got store="):
        logitstore.open(url, scheme=Scheme(k=4))


def test_acceptance_from_a_view_equals_that_from_a_smaller_dump(tiny, tiny_store, tmp_path):
    from tests.helpers.tiny import write_store

    store = logitstore.open(tiny_store)
    documents = [(store[i].ids, store[i].loss_mask) for i in range(4)]
    target = AutoModelForCausalLM.from_pretrained(tiny.target).eval()
    small = write_store(tmp_path / "small.zarr", documents, target, AutoTokenizer.from_pretrained(tiny.tokenizer), k=5)
    draft = AutoModelForCausalLM.from_pretrained(tiny.draft)
    wanted = cached_acceptance(draft, logitstore.open(small))
    found = cached_acceptance(draft, logitstore.open(tiny_store, scheme=Scheme(k=5)), max_documents=4)
    assert found.rows == wanted.rows
    assert found.argmax_agreement == wanted.argmax_agreement
    for name in ("alpha_lower", "alpha_upper", "alpha_estimate", "forward_kl"):
        assert getattr(found, name) == pytest.approx(getattr(wanted, name), abs=3e-3)
    whole = cached_acceptance(draft, store, max_documents=4)
    assert found.alpha_upper - found.alpha_lower > whole.alpha_upper - whole.alpha_lower


def test_train_and_evaluate_read_a_view(tiny, tiny_store, tmp_path, capsys):
    from trainer.commands import evaluate as evaluate_command
    from trainer.commands import train as train_command

    folder = tmp_path / "draft"
    argv = ["--store", tiny_store, "--draft", tiny.draft, "--output_dir", str(folder), "--k", "4", "--mass", "0.9"]
    argv += ["--no_progress", "true", "--use_cpu", "true", "--max_steps", "2"]
    train_command.run(argv)
    run = yaml.safe_load((folder / "run.yaml").read_text())
    assert (run["k"], run["mass"]) == (4, 0.9)
    figures = evaluate_command.run(["--draft", str(folder), "--store", tiny_store, "--no_progress", "--k", "4"])
    assert figures["cached"]["scheme"] == "topk, k 4"
    assert "documents, read as topk, k 4\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--k", "4", "--selection", "adaspec", "--reference", "reference"], "losses must be computed on the rows"),
        (["--k", "17"], "k must be at most 16, which the store keeps, got k=17"),
        (["--mass", "1.5"], "mass must be above 0 and at most 1, got mass=1.5"),
    ],
)
def test_train_refuses_an_invalid_view_with_one_line(tiny, tiny_store, tmp_path, capsys, extra, message):
    from trainer.commands import train as train_command

    argv = ["--store", tiny_store, "--draft", tiny.draft, "--output_dir", str(tmp_path / "draft"), *extra]
    with pytest.raises(SystemExit) as stopped:
        train_command.run([*argv, "--use_cpu", "true"])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")
    assert not (tmp_path / "draft").exists()
