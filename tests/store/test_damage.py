"""Every kind of damage to every kind of file: verify finds it, reading finds it, and the next dump repairs it alone."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import logitstore
from logitstore.commands import main as cli
from logitstore.errors import DamagedShardError, LayerNotFoundError
from logitstore.format import layout, zarr_objects
from logitstore.format.commit import num_values, parse_commit
from logitstore.rows.shard_arrays import entries_per_row
from logitstore.rows.tokens import encode_tokens
from logitstore.storage.storage import Storage
from logitstore.store import writer
from tests.helpers.dumped import ARRAYS, LAYERS, contents, missing, record, times, write_missing
from tests.helpers.paths import ROOT

FIRST, SECOND = 2, 3
"""The shards that the tests damage."""


@pytest.fixture
def url(made, tmp_path):
    """A store that a test may damage."""
    return shutil.copytree(made.url, tmp_path / "cache.zarr")


def belongs(path, damaged):
    """Returns whether a file belongs to one of the damaged shards."""
    is_record = path.startswith("commits/")
    return any(
        path.startswith(f"commits/{layer}/{shard:06d}-")
        if is_record
        else any(f"{path}/".startswith(f"{layer}/{array.name}/c/{shard}/") for array in layout.layer_arrays(layer))
        for layer, shard in damaged
    )


def check(url, made, damaged, gone=frozenset(), error=DamagedShardError):
    """Checks that damage is found and repaired, and that the next dump writes the damaged shards again and no others.

    Args:
        url: The store.
        made: The intact store and its inputs.
        damaged: (layer, shard) of the damaged shards.
        gone: (layer, shard) of the shards without a commit record.
        error: Exception class that reading a damaged shard raises.
    """
    store = logitstore.open(url)
    problems = logitstore.verify(store)
    assert {(p.layer, p.shard) for p in problems if p.shard is not None} == damaged
    assert missing(url) == gone
    for layer, shard in damaged:
        with pytest.raises(error, match=rf"shard[ =]{shard} of layer '{layer}'"):
            store.read_shard(shard)
    for layer, shard in gone:
        with pytest.raises(LayerNotFoundError, match=f"got shard={shard} of layer '{layer}'"):
            store.read_shard(shard)
    for shard in set(range(4)) - {shard for _, shard in damaged | gone}:
        assert len(store.read_shard(shard)) > 0
    before = times(url)
    assert cli.main(["verify", "--repair", str(url)]) == (1 if problems else 0)
    assert missing(url) == damaged | gone
    write_missing(url, made)
    assert logitstore.verify(logitstore.open(url)) == []
    assert contents(url) == contents(made.url)
    after = times(url)
    touched = {path for path, time in before.items() if after.get(path) != time}
    assert all(belongs(path, damaged | gone) for path in touched - {p.path for p in problems}), touched


def flip(position):
    def flipped(folder, name, _):
        content = bytearray(Path(folder, name).read_bytes())
        content[position if position < 0 else position % len(content)] ^= 1 << (abs(position) % 8)
        Path(folder, name).write_bytes(content)

    return flipped


def change(make_bytes):
    def changed(folder, name, _):
        Path(folder, name).write_bytes(make_bytes(Path(folder, name).read_bytes()))

    return changed


def copy_other(folder, name, other):
    shutil.copyfile(folder / other, folder / name)


def swap(folder, name, other):
    (folder / name).rename(folder / "third")
    (folder / other).rename(folder / name)
    (folder / "third").rename(folder / other)


def make_folder(folder, name, _):
    (folder / name).unlink()
    (folder / name / "inner").mkdir(parents=True)
    (folder / name / "file").write_bytes(b"x")


CHANGES = {
    "truncated": change(lambda data: data[: len(data) // 2]),
    "its end lost": change(lambda data: data[:-2]),
    "zero-length": change(lambda _: b""),
    "a byte longer": change(lambda data: data + b"\0"),
    "garbage": change(lambda data: random.Random(len(data)).randbytes(len(data))),
    "another shard's": copy_other,
    "a folder": make_folder,
}
# A shard of a few rows has one inner chunk: 16 bytes of Blosc header, the payload, 4 bytes of checksum; then the index
# of 16 bytes and its checksum of 4 bytes. A test below changes every byte.
FLIPS = {
    "bit flipped in the header": flip(4),
    "bit flipped in the payload": flip(20),
    "bit flipped in a checksum": flip(-21),
    "bit flipped in the index": flip(-12),
}


@pytest.mark.parametrize("array", ARRAYS)
@pytest.mark.parametrize("kind", [*CHANGES, *FLIPS, "deleted", "swapped"])
def test_damaged_object_is_found_and_repaired(url, made, array, kind):
    folder, layer = url / array / "c", array.rpartition("/")[0]
    assert len({(folder / str(shard)).read_bytes() for shard in (FIRST, SECOND)}) == 2
    damaged = {(layer, FIRST)}
    if kind == "deleted":
        (folder / str(FIRST)).unlink()
    elif kind == "swapped":
        swap(folder, str(FIRST), str(SECOND))
        damaged |= {(layer, SECOND)}
    else:
        (CHANGES | FLIPS)[kind](folder, str(FIRST), str(SECOND))
    check(url, made, damaged)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", [*CHANGES, *FLIPS, "deleted", "swapped", "renamed"])
def test_damaged_commit_record_is_found_and_repaired(url, made, layer, kind):
    path, other = (record(url, layer, shard) for shard in (FIRST, SECOND))
    damaged, gone = {(layer, FIRST)}, set()
    if kind == "deleted":
        path.unlink()
        damaged, gone = set(), damaged
    elif kind == "renamed":
        path.rename(path.with_name(path.name.replace("r-", "1r-")))
    elif kind == "swapped":
        swap(path.parent, path.name, other.name)
        damaged |= {(layer, SECOND)}
    else:
        (CHANGES | FLIPS)[kind](path.parent, path.name, other.name)
    # A listing shows a folder in the same way as a record.
    check(url, made, damaged, gone, LayerNotFoundError if kind == "a folder" else DamagedShardError)


@pytest.mark.parametrize("layer", LAYERS)
def test_record_named_with_another_digest_damages_only_its_own_layer(url, made, layer):
    path = record(url, layer, FIRST)
    digest = path.name.split("-")[6]
    path.rename(path.with_name(path.name.replace(digest, "0123456789ab")))
    check(url, made, {(layer, FIRST)})


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("keep", [True, False])
def test_record_named_with_another_shard_number_is_damage(url, made, layer, keep):
    """A shard with two records is damaged, because there is no way to decide which of them is right."""
    path = record(url, layer, FIRST)
    other = path.with_name(path.name.replace(f"{FIRST:06d}-", f"{SECOND:06d}-"))
    shutil.copyfile(path, other) if keep else path.rename(other)
    check(url, made, {(layer, SECOND)}, set() if keep else {(layer, FIRST)})


@pytest.mark.parametrize("layer", LAYERS)
def test_record_with_an_invalid_name_is_reported_and_its_shard_is_missing(url, made, layer):
    path = record(url, layer, FIRST)
    path.rename(path.with_name("000002.json"))
    (problem,) = logitstore.verify(logitstore.open(url))
    assert str(problem) == f"{layer}: commits/{layer}/000002.json does not have the name of a commit record"
    check(url, made, set(), {(layer, FIRST)})


@pytest.mark.parametrize("layer", LAYERS)
def test_every_flipped_bit_of_a_record_is_found(made, layer):
    path = record(made.url, layer, FIRST)
    data = path.read_bytes()
    parse_commit(data, layer, FIRST, path.name)
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        with contextlib.suppress(DamagedShardError):
            pytest.fail(f"bit {bit}: {parse_commit(bytes(changed), layer, FIRST, path.name)}")


@pytest.mark.parametrize("array", ARRAYS)
def test_flipped_bit_in_any_byte_of_an_object_is_found(made, array):
    store = logitstore.open(made.url)
    layer, _, name = array.rpartition("/")
    (spec,) = [spec for spec in layout.layer_arrays(layer) if spec.name == name]
    commit = store.reader.commit(layer, FIRST)
    data = (made.url / array / "c" / str(FIRST)).read_bytes()
    sizes = {"shard_rows": store.spec.shard_rows, "k": entries_per_row(store.spec, layer)}
    length = num_values(commit, spec.per)
    zarr_objects.decode(data, length, spec, **sizes)
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        with pytest.raises(ValueError, match=r"chunk|index"):
            zarr_objects.decode(bytes(changed), length, spec, **sizes)


def test_object_in_the_place_of_an_absent_one_is_damage_for_tokens(url, made):
    victim = url / "tokens/ids/c/1"
    assert not victim.exists()
    assert not logitstore.open(url).read_shard(1).ids.any()
    victim.write_bytes((url / "tokens/ids/c/2").read_bytes())
    check(url, made, {("tokens", 1)})
    assert not victim.exists()


def write_masked(url, made):
    """Writes a store of two shards. No row of the second counts, so all but three of its arrays are fill values."""
    whole = logitstore.open(made.url)
    storage, spec = Storage(url), dataclasses.replace(whole.spec, num_shards=2)
    writer.create_store(storage, spec)
    for layer in LAYERS[1:]:
        writer.add_layer(storage, spec, layer, whole.layers[layer].spec)
    for shard in range(2):
        digest = None
        for layer in LAYERS:
            commit, arrays = whole.reader.commit(layer, shard), whole.reader.read_arrays(layer, shard)
            if shard == 1:
                blank = {a.name for a in layout.layer_arrays(layer)} - {"ids", "lengths"}
                arrays |= {name: np.full_like(arrays[name], np.nan if arrays[name].dtype.kind == "f" else 0)
                           for name in blank}  # fmt: skip
                arrays |= {name: arrays[name][:0] for name in ("gaps", "logprobs", "draws") if name in arrays}
                if layer == "tokens":
                    arrays = encode_tokens(arrays["ids"], arrays["loss_mask"], arrays["lengths"])
            digest = writer.LayerWriter(storage, spec, layer).write(
                shard, arrays, documents=commit.documents, rows=commit.rows, counted=0 if shard else commit.counted,
                computed_from=digest, started=time.monotonic(),
            ).digest  # fmt: skip
    return url


@pytest.mark.parametrize("array", sorted({*ARRAYS} - {"tokens/ids", "tokens/lengths", "tokens/digests"}))
def test_object_of_an_array_without_values_is_damage(made, tmp_path, array):
    url = write_masked(tmp_path / "cache.zarr", made)
    layer, victim = array.rpartition("/")[0], url / array / "c/1"
    assert not victim.exists()
    assert logitstore.verify(logitstore.open(url)) == []
    assert not logitstore.open(url).read_shard(1).loss_mask.any()
    shutil.copyfile(victim.with_name("0"), victim)
    store = logitstore.open(url)
    assert [(problem.layer, problem.shard) for problem in logitstore.verify(store)] == [(layer, 1)]
    with pytest.raises(DamagedShardError, match=f"shard 1 of layer '{layer}'.*(checksum|more than [0-9]+ values)"):
        store.read_shard(1)
    assert cli.main(["verify", "--repair", str(url)]) == 1
    write_masked(url, made)
    assert not victim.exists()
    assert logitstore.verify(logitstore.open(url)) == []


def damage_all(url):
    """Damages shards of every layer, each in another way, and one metadata file. Returns (layer, shard) of all."""
    Path(url, "tokens/ids/c/3").write_bytes(b"")
    flip(-12)(url / "tokens/lengths/c", "1", None)
    swap(url / "target/gaps/c", "0", "1")
    record(url, "target", 3).unlink()
    make_folder(url / "losses/reference/ce/c", "2", None)
    record(url, "losses/reference", 0).write_text("{")
    Path(url, "target/entropy/zarr.json").write_text("{}")
    return {
        ("tokens", 1), ("tokens", 3), ("target", 0), ("target", 1), ("target", 3),
        ("losses/reference", 0), ("losses/reference", 2),
    }  # fmt: skip


@pytest.mark.long
def test_repeated_dump_after_repair_writes_only_the_damaged_shards_again(url, made, capsys):
    """Runs the dump again as `verify --repair` asks, with a real Ray cluster."""
    damaged = damage_all(url)
    before = {path: time for path, time in times(url).items() if not belongs(path, damaged)}
    assert cli.main(["verify", "--repair", str(url)]) == 1
    assert missing(url) == damaged
    shown = capsys.readouterr().out
    assert "repaired: target/entropy/zarr.json: written anew" in shown
    assert "next: run each dump of this store again with the same options; the dumps write " in shown
    command = ["--store", str(url), "--data", made.data, "--target", made.target, "--scheme", "sample"]
    command += ["--num_draws", "6", "--seed", "1", "--reference", f"reference={made.reference}"]
    command += ["--num_proc", "1", "--num_actors", "1", "--cpus_per_actor", "1", "--batch_tokens", "256"]
    run = subprocess.run(
        [sys.executable, "-m", "logitstore.commands.main", "dump", *command], cwd=ROOT, capture_output=True, text=True,
        timeout=240, check=False,
        env=os.environ | {"RAY_ADDRESS": "local", "HF_DATASETS_CACHE": str(url.parent), "TQDM_DISABLE": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert cli.main(["verify", str(url)]) == 0
    assert contents(url) == contents(made.url)
    after = times(url)
    del before["target/entropy/zarr.json"]
    assert {path: after.get(path) for path in before} == before
