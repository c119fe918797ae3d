"""Hostile stores: false metadata. helpers/hostile.py describes the expected outcomes."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from tests.helpers import stores
from tests.helpers.hostile import FILES, check, deep, refused


@pytest.fixture
def url(small_store, tmp_path):
    """A copy of a valid store, which the test makes invalid."""
    return stores.copy(small_store, tmp_path / "cache.zarr")


def test_valid_store_is_read_without_errors(reader, small_store):
    assert not any(check(reader, small_store, {}).values())


# Specs and other contents of zarr.json

HUGE = 10**18
SPECS = {
    "no store": ("", lambda a: a.clear(), "format_version must be 1"),
    "num_shards": ("", lambda a: a.update(num_shards=HUGE), f"num_shards={HUGE}"),
    "num_shards negative": ("", lambda a: a.update(num_shards=-1), "num_shards=-1"),
    "num_shards float": ("", lambda a: a.update(num_shards=3.0), "num_shards must be of type int, got .*3.0"),
    "num_shards bool": ("", lambda a: a.update(num_shards=True), "num_shards must be of type int, got .*True"),
    "num_shards long": ("", lambda a: a.update(num_shards=10**4000), "num_shards must be"),
    "shard_rows": ("", lambda a: a.update(shard_rows=10**15), "shard_rows=1000000000000000"),
    "shard_rows negative": ("", lambda a: a.update(shard_rows=-64), "shard_rows=-64"),
    "shard_rows 0": ("", lambda a: a.update(shard_rows=0), "shard_rows=0"),
    "shard_rows odd": ("", lambda a: a.update(shard_rows=2**14 + 1), "shard_rows=16385"),
    "max_length": ("", lambda a: a.update(max_length=HUGE), f"max_length={HUGE}"),
    "max_length negative": ("", lambda a: a.update(max_length=-1), "max_length=-1"),
    "max_length null": ("", lambda a: a.update(max_length=None), "max_length must be of type int, got .*None"),
    "version": ("", lambda a: a.update(format_version=2**70), "format_version must be 1"),
    "version bool": ("", lambda a: a.update(format_version=True), "format_version must be of type int, got .*True"),
    "vocabulary": ("", lambda a: a["tokenizer"].update(vocab_size=HUGE), f"vocab_size={HUGE}"),
    "vocabulary 0": ("", lambda a: a["tokenizer"].update(vocab_size=0), "vocab_size=0"),
    "vocabulary list": ("", lambda a: a["tokenizer"].update(vocab_size=[1]), r"vocab_size=\[1\]"),
    "columns": ("", lambda a: a["data"].update(columns={"a": []}), "columns must be one of"),
    "unknown": ("", lambda a: a.update(__class__="os.system"), "known fields only, got '__class__'"),
    "tokenizer a list": ("", lambda a: a.update(tokenizer=[]), "tokenizer must be a JSON object"),
    "losses given": ("", lambda a: a.update(losses=[]), "known fields only, got 'losses'"),
    "target given": ("", lambda a: a.update(target=3), "known fields only, got 'target'"),
    "appends given": ("", lambda a: a.update(appends=[{}]), "known fields only, got 'appends'"),
    "k": ("target", lambda a: a["scheme"].update(k=HUGE), f"k={HUGE}"),
    "k negative": ("target", lambda a: a["scheme"].update(k=-4), "k=-4"),
    "k float": ("target", lambda a: a["scheme"].update(k=4.0), "k must be of type int, got .*4.0"),
    "k string": ("target", lambda a: a["scheme"].update(k="4"), "k must be of type int, got .*'4'"),
    "k_min": ("target", lambda a: a["scheme"].update(k_min=5), "k_min=5"),
    "scheme": ("target", lambda a: a["scheme"].update(name="pickle"), "scheme.name must be one of|scheme=pickle"),
    "mass": ("target", lambda a: a["scheme"].update(mass=-0.5), "mass=-0.5"),
    "mass long": ("target", lambda a: a["scheme"].update(mass=10**400), "mass must be of type float"),
    "codebook": ("target", lambda a: a["codebook"].update(exponent=1e308), "exponent=1e.308"),
    "exponent": ("target", lambda a: a["codebook"].update(exponent=-2), "exponent=-2"),
    "temperature": ("target", lambda a: a.update(temperature=0), "temperature=0"),
    "model": ("losses/ref", lambda a: a.update(model=None), "model must be a JSON object"),
    "revision": ("losses/ref", lambda a: a["model"].update(revision=1), "revision must be of type str"),
}


@pytest.mark.parametrize("case", SPECS)
def test_invalid_spec_is_refused(reader, url, case):
    group, change, message = SPECS[case]
    stores.change_spec(url, group, change)
    check(reader, url, refused(message))


@pytest.mark.parametrize("group", ["", "target", "losses/ref"])
@pytest.mark.parametrize("number", ["NaN", "1e999", "-Infinity", "-1e999", "1e-999", "9" * 5000])
def test_numbers_that_are_not_finite_or_too_long_are_refused(reader, url, group, number):
    path = Path(url, group, "zarr.json")
    field = {"": "max_length", "target": "mass"}.get(group, "padded_vocab_size")
    path.write_text(re.sub(rf'("{field}": )[\d.]+', rf"\g<1>{number}", path.read_text()))
    check(reader, url, {"open": "FormatError", "info": "exit 2", "verify": "exit 2"})


@pytest.mark.parametrize("group", ["", "target", "losses/draft"])
@pytest.mark.parametrize("content", FILES)
def test_metadata_that_is_not_a_spec_is_refused(reader, url, group, content):
    Path(url, group, "zarr.json").write_bytes(FILES[content])
    check(reader, url, {"open": "FormatError", "info": "exit 2", "verify": "exit 2"}, seconds=8)


@pytest.mark.parametrize("depth", [20, 40, 400, 800, 900, 940, 960, 980, 990])
def test_nested_json_of_any_depth_is_refused(reader, url, depth):
    path = Path(url, "zarr.json")
    name = deep(depth, inner=b"")
    path.write_bytes(path.read_bytes().replace(b'"random.jsonl"', name))
    check(reader, url, {"open": "FormatError"})


def test_metadata_with_a_duplicate_field_is_refused(reader, url):
    path = Path(url, "zarr.json")
    path.write_text(path.read_text().replace('"max_length": 12', '"max_length": 12, "max_length": 12'))
    check(reader, url, refused("named twice"))


# Array metadata: written for other readers; logitstore does not use it


ARRAY_METADATA = [
    lambda a: a.update(shape=[2**62]),
    lambda a: a.update(shape=[HUGE]),
    lambda a: a.update(shape=[2**64]),
    lambda a: a.update(shape=[-64]),
    lambda a: a.update(shape=[1] * 1000),
    lambda a: a.update(shape=[[[]]]),
    lambda a: a["chunk_grid"]["configuration"].update(chunk_shape=[HUGE]),
    lambda a: a.update(codecs=[{"name": "numcodecs.pickle"}]),
    lambda a: a.update(codecs=[{"name": "numcodecs.pickle", "configuration": {"protocol": 5}}]),
    lambda a: a["codecs"][0]["configuration"]["codecs"].append({"name": "os.system", "configuration": {"a": "b"}}),
    lambda a: a.update(codecs="pickle"),
    lambda a: a.update(data_type="object"),
    lambda a: a.update(data_type={"name": "numpy.void", "configuration": {"length_bytes": 10**12}}),
    lambda a: a.update(storage_transformers=[{"name": "numcodecs.pickle"}]),
    lambda a: a.update(fill_value={"a": {}}),
]


@pytest.mark.parametrize("change", ARRAY_METADATA, ids=range(len(ARRAY_METADATA)))
def test_reading_ignores_array_metadata(reader, url, change):
    stores.change_json(Path(url, "target/gaps/zarr.json"), change)
    outcomes = check(reader, url, {"open": "", "shard 0": "", "shard 1": "", "document 0": ""})
    assert not any(outcome for step, outcome in outcomes.items() if step not in ("info", "verify"))


APPEND = {
    "data": {"source": "a", "digest": None, "columns": "input_ids", "mask_policy": "given", "documents": None},
    "first_shard": 3,
    "num_shards": 1,
}
APPENDS = {
    "many shards": ({**APPEND, "num_shards": 10**9}, "num_shards=1000000000"),
    "more than there can be": ({**APPEND, "num_shards": 2**24}, "must begin at shard 3|num_shards"),
    "no shards": ({**APPEND, "num_shards": 0}, "num_shards=0"),
    "negative": ({**APPEND, "num_shards": -1}, "num_shards=-1"),
    "gap": ({**APPEND, "first_shard": 4}, "first_shard=4"),
    "again": ({**APPEND, "first_shard": 2}, "first_shard=2"),
    "float": ({**APPEND, "first_shard": 3.0}, "first_shard must be of type int"),
    "more": ({**APPEND, "x": 1}, "known fields only, got 'x'"),
    "list": ([], "must be a JSON object"),
    "null": (None, "must be a JSON object"),
}


@pytest.mark.parametrize("case", APPENDS)
def test_invalid_append_is_refused(reader, url, case):
    value, message = APPENDS[case]
    Path(url, "appends").mkdir()
    Path(url, "appends/000001.json").write_text(json.dumps(value))
    check(reader, url, refused(message))


@pytest.mark.parametrize("content", FILES)
def test_append_file_that_is_not_a_json_object_is_refused(reader, url, content):
    Path(url, "appends").mkdir()
    Path(url, "appends/000001.json").write_bytes(FILES[content])
    check(reader, url, refused(""))


def test_an_append_that_is_too_long_is_refused(reader, url):
    Path(url, "appends").mkdir()
    Path(url, "appends/000001.json").write_text(json.dumps(APPEND) + " " * 2**16)
    check(reader, url, refused("at most 65536 bytes"))


def test_append_of_absent_shards_leaves_the_store_readable(reader, url):
    """The append claims sixteen million shards and three exist: the others take neither memory nor time."""
    Path(url, "appends").mkdir()
    Path(url, "appends/000001.json").write_text(json.dumps({**APPEND, "num_shards": 2**24 - 3}))
    Path(url, "appends/000003.json").write_text("{")
    Path(url, "appends/0000002.json").write_text("{")
    outcomes = check(reader, url, {"open": "", "shard 2": ""}, seconds=12)
    assert "LayerNotFoundError" in outcomes["dataset of losses"]


def test_more_than_10000_appends_are_refused(reader, url):
    Path(url, "appends").mkdir()
    for i in range(10_001):
        os.close(os.open(Path(url, f"appends/{i + 1:06d}.json"), os.O_CREAT | os.O_WRONLY))
    check(reader, url, refused("at most 10000 appends, got"))


def test_store_with_16_million_absent_shards_is_read_quickly(reader, url):
    stores.change_spec(url, "", lambda a: a.update(num_shards=2**24))
    outcomes = check(reader, url, {"open": "", "shard 2": ""}, seconds=12)
    assert "LayerNotFoundError" in outcomes["dataset of losses"]
