"""Selection of rows: every score and rule compared with plain NumPy, including ties and empty micro-batches."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logitstore.format.schemes import Scheme
from tests.helpers import rows
from tests.helpers.rows import random_target as target_of
from trainer.loss.selection import COLUMNS, LOOKS, SELECTIONS, Candidates, choose, make_rule, quantile

SCORED = [name for name, selection in SELECTIONS.items() if selection.score is not None]
VALUES = st.lists(st.integers(-4, 4), max_size=30)  # a small range, so that ties are common


def values(num_rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = {name: torch.randn(num_rows, generator=generator) for name in (*COLUMNS, *LOOKS)}
    return found | {"draft_likeliest": torch.randint(0, 20, (num_rows,), generator=generator)}


def score(name, support, given):
    selection = SELECTIONS[name]
    needed = {value: given[value] for value in (*selection.columns, *selection.looks)}
    return selection.score(Candidates(support=support, values=needed))


def accepted(support, likeliest):
    """Returns for each row whether the token is kept and fewer than five tokens have more probability."""
    found = []
    for i, token in enumerate(likeliest.tolist()):
        used = support.probs[i] > 0
        ids, p = support.token_ids[i][used].tolist(), support.probs[i][used].tolist()
        found.append(float(token in ids and sum(other > p[ids.index(token)] for other in p) < 5))
    return torch.tensor(found)


ORACLES = {
    "random": lambda given, support: given["random"],
    "adaspec": lambda given, support: given["draft_ce"] - given["reference_ce"],
    "bottom_gap": lambda given, support: given["reference_ce"] - given["draft_ce"],
    "static_gap": lambda given, support: given["initial_ce"] - given["reference_ce"],
    "draft_entropy": lambda given, support: given["draft_entropy"],
    "target_entropy": lambda given, support: given["target_entropy"],
    "label_nll": lambda given, support: given["draft_label_nll"],
    "accepted": lambda given, support: accepted(support, given["draft_likeliest"]),
}


@pytest.mark.parametrize("num_rows", [0, 1, 40])
@pytest.mark.parametrize("kind", ["one entry", "a tail", "ragged", "whole vocabulary", "hybrid"])
@pytest.mark.parametrize("name", SCORED)
def test_every_score_follows_its_definition(name, kind, num_rows):
    support, given = rows.random_rows(kind, num_rows, 20), values(num_rows)
    assert torch.equal(score(name, support, given), ORACLES[name](given, support))


def test_accepted_passes_only_rows_whose_token_is_among_the_five_likeliest():
    support, given = rows.random_rows("whole vocabulary", 200, 20), values(200)
    assert 0.1 < float(score("accepted", support, given).mean()) < 0.5
    given["draft_likeliest"] = support.probs.topk(5).indices[:, 4]
    given["draft_likeliest"] = support.token_ids.gather(1, given["draft_likeliest"][:, None])[:, 0]
    assert score("accepted", support, given).all()  # the fifth likeliest token passes


def kept(rule, scores, documents=None, others=None):
    scores = torch.tensor(scores, dtype=torch.float32)
    documents = torch.tensor(documents or [0] * len(scores), dtype=torch.int64)
    return choose(rule, scores, documents, others)


@given(VALUES, st.sampled_from([0.1, 0.25, 0.4, 0.5, 0.9, 1.0]))
@settings(max_examples=150, deadline=None)
def test_micro_batch_scope_keeps_rows_that_reach_the_quantile(scores, keep):
    found = kept(make_rule("adaspec", keep=keep), scores)
    if not scores:
        assert found.kept.tolist() == []
        assert math.isnan(float(found.threshold))
        return
    threshold = np.quantile(np.array(scores, np.float32), 1 - keep)
    assert float(found.threshold) == pytest.approx(threshold, abs=1e-5)
    assert found.kept.tolist() == [value >= float(found.threshold) for value in scores]
    assert int(found.kept.sum()) >= math.floor(keep * len(scores))
    assert found.weights.tolist() == found.kept.float().tolist()


def test_quantile_equals_torch_quantile():
    scores = torch.randn(1001, generator=torch.Generator().manual_seed(0))
    for keep in (0.05, 0.4, 0.77, 1.0):
        assert float(quantile(scores, keep)) == pytest.approx(float(torch.quantile(scores, 1 - keep)), abs=1e-6)
    assert int((scores >= quantile(scores, 0.4)).sum()) == 401


@pytest.mark.parametrize("scope", ["micro_batch", "step", "queue", "document"])
def test_nan_scores_are_not_silently_dropped(scope):
    rule = make_rule("adaspec", keep=0.4, scope=scope)
    found = kept(rule, [math.nan] * 5, others=torch.full((5,), math.nan))
    assert found.kept.any()


def test_equal_scores_are_all_kept_and_keep_1_keeps_all():
    assert kept(make_rule("adaspec", keep=0.4), [1.0] * 10).kept.all()
    assert kept(make_rule("random", keep=1.0), list(range(33))).kept.all()


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(-3, 3)), max_size=40), st.sampled_from([0.1, 0.2, 0.5, 1.0]))
@settings(max_examples=150, deadline=None)
def test_document_scope_keeps_the_best_rows_of_each_document_rounded_up(pairs, keep):
    pairs.sort(key=lambda pair: pair[0])
    numbers = sorted({document for document, _ in pairs})
    documents, scores = [numbers.index(d) for d, _ in pairs], [float(s) for _, s in pairs]
    found = kept(make_rule("draft_entropy", keep=keep), scores, documents).kept.tolist()
    expected = [False] * len(pairs)
    for number in range(len(numbers)):
        own = [i for i, d in enumerate(documents) if d == number]
        for i in sorted(own, key=lambda i: -scores[i])[: math.ceil(round(keep * len(own), 9))]:
            expected[i] = True
    assert found == expected


def test_document_numbers_may_have_gaps():
    found = kept(make_rule("draft_entropy", keep=0.5), [3.0, 1.0, 2.0, 5.0], [1, 1, 4, 4])
    assert found.kept.tolist() == [True, False, False, True]


def test_step_scope_compares_rows_with_all_micro_batches():
    rule = make_rule("adaspec", keep=0.5, scope="step")
    everything = torch.arange(10.0)
    assert not kept(rule, [0.0, 1.0, 2.0], others=everything).kept.any()
    assert kept(rule, [7.0, 8.0], others=everything).kept.all()


def test_queue_scope_compares_rows_with_recent_ones_and_each_other():
    rule = make_rule("label_nll", keep=0.5, scope="queue")
    assert kept(rule, [0.0, 1.0, 2.0, 3.0], others=torch.zeros(0)).kept.tolist() == [False, False, True, True]
    assert not kept(rule, [0.0, 1.0, 2.0, 3.0], others=torch.full((20,), 9.0)).kept.any()
    assert kept(rule, [0.0, 1.0, 2.0, 3.0], others=torch.full((20,), -9.0)).kept.all()


def test_rows_outside_the_selection_get_the_outside_weight():
    found = kept(make_rule("accepted", keep=0.4, outside_weight=0.25), [0.0, 1.0, 0.0])
    assert found.weights.tolist() == [0.25, 1.0, 0.25]
    assert found.kept.tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "best", "keep": 0.4}, r"selection must be one of \['all', .*\], got selection=best"),
        ({"name": "random", "keep": 0.0}, "keep must be above 0 and at most 1, got keep=0.0; 0.4 is usual"),
        ({"name": "random", "keep": 1.5}, "keep must be above 0 and at most 1, got keep=1.5; 0.4 is usual"),
        (
            {"name": "random", "keep": 0.4, "outside_weight": 2.0},
            "outside_weight must be between 0 and 1, got outside_weight=2.0; 0 is usual",
        ),
        (
            {"name": "draft_entropy", "keep": 0.4, "scope": "batch"},
            r"scope must be one of \['document', .*\], got scope=batch; omit it for document",
        ),
    ],
)
def test_values_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_rule(**arguments)


def test_invalid_combinations_are_refused_with_the_reason():
    sampled, hybrid = (target_of(Scheme(name=name, k=0, num_draws=50)) for name in ("sample", "hybrid"))
    with pytest.raises(ValueError, match="got selection=accepted with scheme=sample, whose rows may lack these tokens"):
        SELECTIONS["accepted"].check(sampled, "accepted")
    SELECTIONS["accepted"].check(hybrid, "accepted")
    for name in SCORED:
        if name in ("random", "label_nll", "draft_entropy"):
            SELECTIONS[name].check(None, name)
        else:
            message = f"needs target rows, got selection={name} with a store that has none; dump the target first"
            with pytest.raises(ValueError, match=message):
                SELECTIONS[name].check(None, name)
