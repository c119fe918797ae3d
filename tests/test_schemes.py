"""Schemes as a command line gives them: their options, what is refused, and the flags that give the same one again."""

from __future__ import annotations

import json
import re

import dump_logits
import pytest
import stores

from logitstore.errors import FormatError, IdentityError
from logitstore.format.schemes import OPTIONS, Scheme, describe, flags, make_scheme
from logitstore.format.spec import TargetSpec, check_same, from_json, maker, to_json

DEFAULTS = {
    "topk": Scheme(name="topk", k=64),
    "nucleus": Scheme(name="nucleus", k=64, mass=0.98, k_min=4),
    "sample": Scheme(name="sample", k=0, num_draws=50, seed=0),
    "hybrid": Scheme(name="hybrid", k=0, num_draws=50, seed=0),
}
GIVEN = {
    "topk": {"k": 7},
    "nucleus": {"k": 9, "mass": 0.1 + 0.2, "k_min": 2},
    "sample": {"num_draws": 3, "seed": 2**63 - 1},
    "hybrid": {"num_draws": 4096, "seed": 11},
}
LINES = {
    "topk": "topk, k 7",
    "nucleus": "nucleus, k 9, mass 0.3, k_min 2",
    "sample": "sample, num_draws 3, seed 9223372036854775807",
    "hybrid": "hybrid, num_draws 4096, seed 11",
}
ALL = sorted({option for options in OPTIONS.values() for option in options})
FOREIGN = [(name, option) for name in OPTIONS for option in ALL if option not in OPTIONS[name]]


def parsed(*arguments):
    """The scheme that the dump job makes of a command line."""
    args = dump_logits.parser().parse_args(["--store", "x", *arguments])
    return make_scheme(args.scheme, {option: getattr(args, option) for option in ALL})


@pytest.mark.parametrize("name", OPTIONS)
def test_options_reach_the_scheme_and_have_defaults(name):
    assert parsed("--scheme", name) == DEFAULTS[name]
    arguments = [part for option, value in GIVEN[name].items() for part in (f"--{option}", repr(value))]
    scheme = parsed("--scheme", name, *arguments)
    assert {option: getattr(scheme, option) for option in OPTIONS[name]} == GIVEN[name]
    assert describe(scheme) == LINES[name]


def test_without_a_scheme_it_is_topk():
    assert parsed() == DEFAULTS["topk"]


@pytest.mark.parametrize("name", OPTIONS)
def test_flags_of_a_scheme_give_the_same_one_again(name):
    for scheme in (DEFAULTS[name], make_scheme(name, GIVEN[name])):
        assert parsed(*flags(scheme)) == scheme


def test_a_nucleus_of_few_entries_has_no_more_at_least():
    assert parsed("--scheme", "nucleus", "--k", "3") == Scheme(name="nucleus", k=3, mass=0.98, k_min=3)


@pytest.mark.parametrize(("name", "option"), FOREIGN)
def test_an_option_of_another_scheme_is_refused_with_those_that_take_it(name, option):
    value = GIVEN["nucleus"].get(option, 5)
    takes = " or ".join(f"--scheme {other}" for other in OPTIONS if option in OPTIONS[other])
    message = f"{option} must be left out with --scheme {name}, got {option}={value}; {takes} takes it"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        parsed("--scheme", name, f"--{option}", repr(value))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--k 0", "k must be between 1 and 65535, got k=0; 64 is usual"),
        ("--k 65536", "k must be between 1 and 65535, got k=65536; 64 is usual"),
        ("--scheme nucleus --mass 0", "mass must be above 0 and at most 1, got mass=0.0; 0.98 is usual"),
        ("--scheme nucleus --mass 1.01", "mass must be above 0 and at most 1, got mass=1.01; 0.98 is usual"),
        ("--scheme nucleus --mass nan", "mass must be above 0 and at most 1, got mass=nan; 0.98 is usual"),
        ("--scheme nucleus --k 3 --k_min 4", "k_min must be between 1 and k=3, got k_min=4"),
        ("--scheme nucleus --k_min 0", "k_min must be between 1 and k=64, got k_min=0"),
        ("--scheme sample --num_draws 1", "num_draws must be between 2 and 4096, got num_draws=1; 50 is usual"),
        ("--scheme hybrid --num_draws 4097", "num_draws must be between 2 and 4096, got num_draws=4097; 50 is usual"),
        ("--scheme sample --seed -1", "seed must be between 0 and 2**63 - 1, got seed=-1; 0 will do"),
        (f"--scheme hybrid --seed {2**63}", f"seed must be between 0 and 2**63 - 1, got seed={2**63}; 0 will do"),
    ],
)
def test_values_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        parsed(*arguments.split())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "rank"}, "scheme must be topk, nucleus, sample or hybrid, got scheme=rank"),
        ({"num_draws": 5}, "num_draws and seed must be 0 with scheme=topk, got num_draws=5, seed=0; sample and hybrid"),
        ({"seed": 5}, "num_draws and seed must be 0 with scheme=topk, got num_draws=0, seed=5; sample and hybrid"),
        ({"mass": 0.5}, "mass and k_min must be 1 with scheme=topk, got mass=0.5, k_min=1"),
        ({"name": "sample", "k": 0, "num_draws": 5, "k_min": 2}, "mass and k_min must be 1 with scheme=sample, got"),
        ({"name": "hybrid", "num_draws": 5}, "k must be 0 with scheme=hybrid, got k=64; num_draws says how many are"),
        ({"name": "sample", "k": 0}, "num_draws must be between 2 and 4096, got num_draws=0"),
    ],
)
def test_what_no_scheme_has_is_refused_and_in_a_store_malformed(fields, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        Scheme(**fields)
    value = to_json(TargetSpec(model=stores.MODEL, scheme=Scheme()))
    value["scheme"] |= fields
    with pytest.raises(FormatError, match=r"scheme.name must be one of \[|scheme is malformed: " + re.escape(message)):
        from_json(TargetSpec, value, "target")


def test_a_scheme_that_no_command_knows_is_refused():
    with pytest.raises(ValueError, match=r"scheme must be one of \['topk', .*got scheme=rank"):
        make_scheme("rank", {})


def test_more_entries_than_tokens_are_refused_where_rows_are_truncated():
    with pytest.raises(ValueError, match="k must be at most the vocabulary size 63, got k=64; give a smaller --k"):
        DEFAULTS["topk"].check_vocabulary(63)
    for name in ("sample", "hybrid"):
        DEFAULTS[name].check_vocabulary(2)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_is_part_of_what_a_layer_is(name):
    """A store of other draws, or of another seed, is another store."""
    spec = TargetSpec(model=stores.MODEL, scheme=DEFAULTS[name])
    assert from_json(TargetSpec, json.loads(json.dumps(to_json(spec))), "target") == spec
    for option, value in GIVEN[name].items():
        other = TargetSpec(model=stores.MODEL, scheme=make_scheme(name, {option: value}))
        assert maker(other) != maker(spec)
        with pytest.raises(IdentityError, match=f"target.scheme.{option} must be .* as in the store, got {option}="):
            check_same(spec, other, "target", "give another --store")


def test_the_name_of_a_scheme_is_part_of_what_a_layer_is():
    sample, hybrid = (TargetSpec(model=stores.MODEL, scheme=DEFAULTS[name]) for name in ("sample", "hybrid"))
    assert maker(sample) != maker(hybrid)
    with pytest.raises(IdentityError, match=r"target.scheme.name must be 'sample' as in the store, got name='hybrid'"):
        check_same(sample, hybrid, "target", "give another --store")
