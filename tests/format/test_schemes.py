"""Schemes from command-line options: defaults, refused values, and the flags that describe a scheme."""

from __future__ import annotations

import json
import re

import pytest

from logitstore.commands import dump as dump_command
from logitstore.errors import FormatError, IdentityError
from logitstore.format.schemes import OPTIONS, Scheme, describe, make_scheme
from logitstore.format.spec import TargetSpec, check_same, from_json, maker, to_json
from tests.helpers import stores

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
    """Returns the scheme that the dump job makes from a command line."""
    args = dump_command.parser().parse_args(["--store", "x", *arguments])
    return make_scheme(args.scheme, {option: getattr(args, option) for option in ALL})


@pytest.mark.parametrize("name", OPTIONS)
def test_scheme_options_are_parsed_and_have_defaults(name):
    assert parsed("--scheme", name) == DEFAULTS[name]
    arguments = [part for option, value in GIVEN[name].items() for part in (f"--{option}", repr(value))]
    scheme = parsed("--scheme", name, *arguments)
    assert {option: getattr(scheme, option) for option in OPTIONS[name]} == GIVEN[name]
    assert describe(scheme) == LINES[name]


def test_default_scheme_is_topk():
    assert parsed() == DEFAULTS["topk"]


@pytest.mark.parametrize("name", OPTIONS)
def test_flags_of_a_scheme_parse_to_the_same_scheme(name):
    for scheme in (DEFAULTS[name], make_scheme(name, GIVEN[name])):
        flags = [part for option in OPTIONS[name] for part in (f"--{option}", repr(getattr(scheme, option)))]
        assert parsed("--scheme", name, *flags) == scheme


def test_default_k_min_is_at_most_k():
    assert parsed("--scheme", "nucleus", "--k", "3") == Scheme(name="nucleus", k=3, mass=0.98, k_min=3)


@pytest.mark.parametrize(("name", "option"), FOREIGN)
def test_option_of_another_scheme_is_refused_and_its_schemes_are_named(name, option):
    value = GIVEN["nucleus"].get(option, 5)
    takes = " or ".join(f"--scheme {other}" for other in OPTIONS if option in OPTIONS[other])
    message = f"{option} needs {takes}, got {option}={value} with --scheme {name}; omit --{option}, or "
    message += "give another --scheme"
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
        ("--scheme sample --seed -1", "seed must be between 0 and 2**63 - 1, got seed=-1; 0 is usual"),
        (f"--scheme hybrid --seed {2**63}", f"seed must be between 0 and 2**63 - 1, got seed={2**63}; 0 is usual"),
    ],
)
def test_values_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        parsed(*arguments.split())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "rank"}, "scheme must be topk, nucleus, sample or hybrid, got scheme=rank"),
        ({"num_draws": 5}, "num_draws and seed must be 0 with scheme=topk, got num_draws=5, seed=0; only sample and"),
        ({"seed": 5}, "num_draws and seed must be 0 with scheme=topk, got num_draws=0, seed=5; only sample and"),
        ({"mass": 0.5}, "mass and k_min must be 1 with scheme=topk, got mass=0.5, k_min=1"),
        ({"name": "sample", "k": 0, "num_draws": 5, "k_min": 2}, "mass and k_min must be 1 with scheme=sample, got"),
        ({"name": "hybrid", "num_draws": 5}, "k must be 0 with scheme=hybrid, got k=64; give num_draws instead"),
        ({"name": "sample", "k": 0}, "num_draws must be between 2 and 4096, got num_draws=0"),
    ],
)
def test_invalid_scheme_is_refused_by_the_class_and_in_a_store(fields, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        Scheme(**fields)
    value = to_json(TargetSpec(model=stores.MODEL, scheme=Scheme()))
    value["scheme"] |= fields
    with pytest.raises(FormatError, match=r"scheme.name must be one of \[|scheme is malformed: " + re.escape(message)):
        from_json(TargetSpec, value, "target")


def test_unknown_scheme_name_is_refused():
    with pytest.raises(ValueError, match=r"scheme must be one of \['topk', .*got scheme=rank"):
        make_scheme("rank", {})


def test_k_above_the_vocabulary_size_is_refused_for_truncating_schemes():
    with pytest.raises(ValueError, match="k must be at most the vocabulary size 63, got k=64; give a smaller --k"):
        DEFAULTS["topk"].check_vocabulary(63)
    for name in ("sample", "hybrid"):
        DEFAULTS[name].check_vocabulary(2)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_scheme_option_is_part_of_the_identity_of_a_layer(name):
    """A store with another number of draws, or another seed, is a different store."""
    spec = TargetSpec(model=stores.MODEL, scheme=DEFAULTS[name])
    assert from_json(TargetSpec, json.loads(json.dumps(to_json(spec))), "target") == spec
    for option, value in GIVEN[name].items():
        other = TargetSpec(model=stores.MODEL, scheme=make_scheme(name, {option: value}))
        assert maker(other) != maker(spec)
        with pytest.raises(IdentityError, match=r"target.scheme must be .* as in the store, got "):
            check_same(spec, other, "target", "give another --store")


def test_scheme_name_is_part_of_the_identity_of_a_layer():
    sample, hybrid = (TargetSpec(model=stores.MODEL, scheme=DEFAULTS[name]) for name in ("sample", "hybrid"))
    assert maker(sample) != maker(hybrid)
    with pytest.raises(IdentityError, match=r"target.scheme must be sample, .* as in the store, got hybrid, "):
        check_same(sample, hybrid, "target", "give another --store")
