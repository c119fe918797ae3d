"""Randomly changed stores with corrected checksums are read, or refused with a LogitStoreError, within a time limit.

Another process reads them, so that a crash or a hang fails one example and not the test run. The inputs are the same in
every run; tests/helpers/fuzz_store.py searches further, guided by coverage.
"""

from __future__ import annotations

import json
import os
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from logitstore.format import layout
from logitstore.format.commit import CHECKSUM_FIELD
from logitstore.storage.storage import Storage
from logitstore.store import writer
from logitstore.store.commits import protocol
from tests.helpers import stores
from tests.helpers.hostile import MOST_SECONDS

FIXED = settings(
    max_examples=50,
    deadline=None,  # `reader` limits processor time instead, because the machine may be busy
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
ARRAYS = [(layer, array.name) for layer in stores.LAYERS[:3] for array in layout.layer_arrays(layer)]
INTEGERS = st.one_of(
    st.integers(-3, 70), st.sampled_from([2**k + d for k in (8, 16, 31, 32, 53, 63, 80) for d in (-1, 0, 1)])
)
SCALARS = st.one_of(
    st.none(), st.booleans(), INTEGERS, st.floats(), st.text(max_size=8),
    st.sampled_from(["tokens", "../x", "sha256:" + "0" * 64, "topk", "hybrid", "\x1b[2J", "\ud800", ""]),
)  # fmt: skip
WORDS = [0, 1, 2, 5, 2**31 - 1, 2**31, 0x7F800000, 0xFF800000, 0x7FC00001, 2**32 - 1]
"""32-bit words, some of which are infinities and NaN as floats."""
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4)
)


@pytest.fixture(scope="module")
def small_store(tmp_path_factory):
    """A store in which every array has objects."""
    return stores.make(tmp_path_factory.mktemp("small") / "cache.zarr", scheme=stores.SAMPLE)


def places(value, path=()):
    """Yields the path of every part of a JSON value."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


@st.composite
def changed(draw, value):
    """Draws a JSON value with one or two changes: parts replaced, removed, added, or swapped."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from(sorted(places(value), key=str)))
        if not path:
            return draw(JSON) if draw(st.booleans()) else value
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        kind = draw(st.sampled_from(["set", "set", "integer", "remove", "add", "swap"]))
        if kind == "remove":
            del parent[path[-1]]
        elif kind == "add" and isinstance(parent, dict):
            parent[draw(st.text(max_size=6))] = draw(JSON)
        elif kind == "swap":
            other = draw(st.sampled_from(sorted(places(value), key=str)))
            found = value
            for key in other:
                found = found[key]
            parent[path[-1]] = json.loads(json.dumps(found))
        else:
            parent[path[-1]] = draw(INTEGERS if kind == "integer" else JSON)
    return value


@st.composite
def garbled(draw, data):
    """Draws bytes with a few changes: some replaced, removed, inserted, or doubled."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        kind = draw(st.sampled_from(["bit", "byte", "word", "remove", "insert", "copy", "end"]))
        if kind == "bit" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "byte" and data:
            data[at] = draw(st.sampled_from([0, 1, 127, 128, 255]))
        elif kind == "word":
            number = draw(st.sampled_from([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 16, 20, len(data)]))
            data[at : at + 4] = number.to_bytes(4, "little")
        elif kind == "remove":
            del data[at : at + draw(st.integers(1, 16))]
        elif kind == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=16))
        elif kind == "copy":
            data[at:at] = data[at : at + 16]
        else:
            del data[at:]
    return bytes(data)


def survives(reader, url, steps=None):
    outcomes = reader.read(url, steps=steps)
    assert outcomes.pop("seconds") < MOST_SECONDS
    bad = [outcome for outcome in outcomes.values() if outcome.startswith("BAD")]
    assert not bad, bad[0]


def fresh(small_store, tmp_path):
    """Returns a fresh copy of the store made of hard links. Tests must replace files and never write to them."""
    url = tmp_path / "cache.zarr"
    shutil.rmtree(url, ignore_errors=True)
    shutil.copytree(small_store, url, copy_function=os.link)
    return url


def replace(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


@FIXED
@given(st.data())
def test_randomly_changed_metadata_is_read_or_refused(reader, small_store, tmp_path, data):
    url = fresh(small_store, tmp_path)
    group = data.draw(st.sampled_from(["", "", "target", "losses/ref", "tokens", "target/tail"]))
    path = url / group / "zarr.json"
    if data.draw(st.integers(0, 4)):
        replace(path, data.draw(changed(json.loads(path.read_text()))))
    else:
        replace(path, data.draw(garbled(path.read_bytes())))
    survives(reader, url)


@FIXED
@given(st.data())
def test_randomly_changed_commit_records_are_read_or_refused(reader, small_store, tmp_path, data):
    url = fresh(small_store, tmp_path)
    layer = data.draw(st.sampled_from(stores.LAYERS))
    path = stores.record(url, layer, 1)
    if data.draw(st.integers(0, 4)):
        value = json.loads(path.read_text())
        del value[CHECKSUM_FIELD]
        path.unlink()
        stores.put_record(url, layer, 1, data.draw(changed(value)))
    else:
        replace(path, data.draw(garbled(path.read_bytes())))
    survives(reader, url)


@FIXED
@given(st.data())
def test_randomly_changed_commit_names_are_read_or_refused(reader, small_store, tmp_path, data):
    url = fresh(small_store, tmp_path)
    path = stores.record(url, data.draw(st.sampled_from(stores.LAYERS)), 1)
    name = data.draw(garbled(path.name.encode())).replace(b"/", b"-").replace(b"\0", b"0")[:200]
    target = bytes(path.parent) + b"/" + name
    if not os.path.exists(target):
        (os.rename if data.draw(st.booleans()) else os.link)(path, target)
    survives(reader, url)


@FIXED
@given(st.data())
def test_randomly_changed_appends_and_set_aside_records_are_read_or_refused(reader, small_store, tmp_path, data):
    url = fresh(small_store, tmp_path)
    spec = {"source": "a", "digest": None, "columns": "input_ids", "mask_policy": "given", "documents": None}
    append = {"data": spec, "first_shard": 3, "num_shards": 1}
    reason = {"reason": "killed", "attempts": 3, "written": "2026-11-21T08:50:47+00:00"}
    paths = {"appends/000001.json": append, "appends/000001.claim": append, "set_aside/target/000001.json": reason}
    path = data.draw(st.sampled_from(sorted(paths)))
    replace(url / path, data.draw(changed(paths[path])))
    if path.startswith("set_aside"):
        stores.record(url, "target", 1).unlink()
    survives(reader, url, ["info", "verify", "dataset"])


@FIXED
@given(st.data())
def test_randomly_changed_objects_with_valid_checksums_are_read_or_refused(reader, small_store, tmp_path, data):
    url = fresh(small_store, tmp_path)
    layer, name = data.draw(st.sampled_from(ARRAYS))
    path = url / layer / name / "c/1"
    found = stores.Object.of(path.read_bytes(), stores.num_chunks(stores.array_of(layer, name)))
    if data.draw(st.booleans()):
        entry = data.draw(st.sampled_from(found.index))
        entry[data.draw(st.integers(0, 1))] = data.draw(INTEGERS) % 2**64
    chunk_bytes = bytes(found.body)
    found.body = bytearray(data.draw(garbled(chunk_bytes)))
    if data.draw(st.booleans()):  # correct the length in the header
        found.index[0] = [0, len(found.body)]
        found.body[12:16] = max(0, len(found.body) - 4).to_bytes(4, "little")
    replace(path, found.to_bytes())
    survives(reader, url, ["verify", "shard 1"])


@FIXED
@given(st.data())
def test_randomly_changed_values_with_valid_commits_are_read_or_refused(reader, small_store, tmp_path, data):
    url = fresh(small_store, tmp_path)
    layer, name = data.draw(st.sampled_from(ARRAYS))

    def change(values):
        raw = bytearray(values.tobytes())
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.integers(0, len(raw) // values.itemsize - 1)) * values.itemsize
            word = data.draw(st.sampled_from(WORDS))
            raw[at : at + values.itemsize] = (word % 256**values.itemsize).to_bytes(values.itemsize, "little")
        return type(values)((len(values),), values.dtype, bytes(raw))

    stores.change_values(url, layer, 1, **{name: change})
    survives(reader, url, ["verify", "shard 1", "dataset of losses"])


@FIXED
@given(st.data())
def test_leftover_winner_files_are_replaced_or_adopted_by_the_next_writer(small_store, tmp_path, data):
    """A winner file is adopted only if all its objects are there."""
    url = fresh(small_store, tmp_path)
    record = stores.record(url, "target", 1)
    winner = {"attempt": "0" * 32, "objects": ["tail"], "name": record.name, "commit": record.read_text()}
    values, commit = stores.read(small_store, "target", 1)
    record.unlink()
    folder = url / protocol.staging("target", 1)
    replace(folder / f"{protocol.WINNER}-0.json", data.draw(changed(winner)))
    spec = stores.spec_of(3, scheme=stores.SAMPLE)
    sizes = {name: getattr(commit, name) for name in ("documents", "rows", "counted", "set_aside", "computed_from")}
    written = writer.LayerWriter(Storage(url), spec, "target").write(1, values, started=0.0, **sizes)
    assert written.digest == commit.digest
