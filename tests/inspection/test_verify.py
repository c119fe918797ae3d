"""`logitstore verify` for problems other than damaged shards: metadata, stale shards, samples, leftovers."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest

import logitstore
from logitstore.commands import main as cli
from logitstore.errors import IdentityError, LayerNotFoundError
from logitstore.inspection.verify import places, repair
from logitstore.storage.storage import Storage
from logitstore.store import writer
from logitstore.store.take_back import sweep, take_back
from tests.helpers.dumped import (
    ARRAYS,
    LAYERS,
    add_layers,
    contents,
    missing,
    prepare_tokens,
    record,
    times,
    write_missing,
)


@pytest.fixture
def url(made, tmp_path):
    return shutil.copytree(made.url, tmp_path / "cache.zarr")


def found(url):
    return [str(problem) for problem in logitstore.verify(logitstore.open(url))]


def verify(url, *options):
    return cli.main(["verify", *options, str(url)])


@pytest.mark.parametrize("array", ARRAYS)
@pytest.mark.parametrize("kind", ["deleted", "truncated", "another's", "too short", "a folder"])
def test_damaged_array_metadata_is_found_and_written_again(url, made, array, kind):
    path = url / array / "zarr.json"
    if kind in ("deleted", "a folder"):
        path.unlink()
        (path / "inner").mkdir(parents=True) if kind == "a folder" else None
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:-3])
    else:
        values = json.loads(path.read_text())
        values["shape"] = [values["shape"][0] // 2] if kind == "too short" else values["shape"]
        values["fill_value"] = 7 if kind == "another's" else values["fill_value"]
        path.write_text(json.dumps(values))
    words = {"deleted": "is missing", "a folder": "is missing", "truncated": "is not JSON",
             "another's": "describes another array", "too short": "has room for 2 shards, not for shard 3"}  # fmt: skip
    assert found(url) == [f"{array.rpartition('/')[0]}: {array}/zarr.json {words[kind]}"]
    assert len(logitstore.open(url).read_shard(0)) > 0  # logitstore does not need array metadata
    assert verify(url, "--repair") == 1
    assert contents(url) == contents(made.url)
    assert verify(url, "--repair") == 0


@pytest.mark.parametrize("path", ["tokens/zarr.json", "losses/zarr.json"])
@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_damaged_group_metadata_is_found_and_written_again(url, made, path, content):
    (url / path).unlink() if content is None else (url / path).write_text(content)
    (problem,) = found(url)
    assert f"{path} {'is missing' if content is None else 'does not describe a Zarr group'}" in problem
    assert verify(url, "--repair") == 1
    assert contents(url) == contents(made.url)


@pytest.mark.parametrize("path", ["zarr.json", "target/zarr.json", "losses/reference/zarr.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"zarr_format": 3, "node_type": "group"}'])
@pytest.mark.parametrize("command", ["info", "verify"])
def test_damaged_spec_is_reported_with_one_line(url, path, content, command, capsys):
    (url / path).write_bytes(content)
    assert cli.main([command, str(url)]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    if content in (b"", b"{"):
        assert f"{path} must be JSON" in shown.err
        assert "or delete it and run the dump again with the same options, which writes it anew" in shown.err


@pytest.mark.parametrize("layer", LAYERS[1:])
def test_layer_without_its_spec_is_named_and_restored_by_the_same_dump(url, made, layer):
    (url / layer / "zarr.json").unlink()
    before = times(url)
    store = logitstore.open(url)
    assert layer not in store.layers
    if layer == "target":
        message = r"layer 'target' in .* must have shard 0, because layer 'losses/reference' has"
        with pytest.raises(LayerNotFoundError, match=message):
            store.read_shard(0)
    assert len(store.read_shard(0, layers=())) > 0
    assert found(url) == [
        f"{layer}: {layer}/zarr.json is missing, so readers do not see its 4 shards; restore it from a copy of the "
        "store, or run the dump again with the same model and options, which writes it anew"
    ]
    assert verify(url, "--repair") == 1
    assert times(url) == before  # there is nothing to repair
    one = {"target": made.reference} if layer == "target" else {"reference": made.target}
    message = f"{layer} has 4 committed shards, but the zarr.json with their spec is missing, and they were made with"
    with pytest.raises(IdentityError, match=message):
        add_layers(url, dataclasses.replace(made, **one))
    add_layers(url, made)
    assert contents(url) == contents(made.url)
    assert found(url) == []


def test_store_without_its_spec_is_restored_only_with_the_same_documents(url, made):
    (url / "zarr.json").unlink()
    assert verify(url) == 2
    spec = logitstore.open(made.url).spec
    message = "tokens has 4 committed shards, but the zarr.json with their spec is missing"
    with pytest.raises(IdentityError, match=message):
        writer.create_store(Storage(url), dataclasses.replace(spec, max_length=65))
    prepare_tokens(url, made)
    assert contents(url) == contents(made.url)
    assert found(url) == []


def make_stale(url):
    """Replaces target/2, so that losses/reference/2 is stale. Returns the short digests before and after."""
    store = logitstore.open(url)
    commit, arrays = store.reader.commit("target", 2), store.reader.read_arrays("target", 2)
    take_back(store.storage, "target", 2)
    arrays["entropy"] = arrays["entropy"] + np.float32(0.5)
    new = writer.LayerWriter(store.storage, store.spec, "target").write(
        2, arrays, documents=commit.documents, rows=commit.rows, counted=commit.counted,
        computed_from=commit.computed_from, started=0.0,
    )  # fmt: skip
    return commit.digest[7:19], new.digest[7:19]


def test_stale_losses_are_reported_and_taken_back(url, capsys):
    was, now = make_stale(url)
    assert found(url) == [f"losses/reference/2: stale values, computed from target {was}, but target is {now} now"]
    assert cli.main(["info", str(url)]) == 0
    assert "stale     shards 2: computed from other values; the dump computes them again" in capsys.readouterr().out
    with pytest.raises(IdentityError, match="got stale values"):
        logitstore.open(url).read_shard(2)
    assert len(logitstore.open(url).read_shard(2, layers=("target",))) > 0
    assert verify(url, "--repair") == 1
    assert missing(url) == {("losses/reference", 2)}


def test_sample_has_a_share_of_each_layer_and_repeats_with_the_seed(made):
    store = logitstore.open(made.url)
    assert places(store) == [(layer, shard) for layer in LAYERS for shard in range(4)]
    few = places(store, 0.01, seed=3)
    assert [layer for layer, _ in few] == list(LAYERS)
    assert places(store, 0.01, seed=3) == few
    assert len({tuple(places(store, 0.5, seed)) for seed in range(5)}) > 1
    assert len(places(store, 0.5)) == 6
    bars = []
    assert logitstore.verify(store, sample=0.5, progress=bars.append) == []
    assert bars == [1] * 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sample", "0"], "sample must be above 0 and at most 1, got sample=0.0"),
        (["--sample", "1.5"], "sample must be above 0 and at most 1, got sample=1.5"),
        (["--sample", "nan"], "sample must be above 0 and at most 1, got sample=nan"),
        (["--num_threads", "0"], "num_threads must be at least 1, got num_threads=0"),
    ],
)
def test_invalid_verify_options_are_refused(made, options, message, capsys):
    assert verify(made.url, *options) == 2
    assert message in capsys.readouterr().err


def test_only_damage_inside_the_sample_is_found(url, capsys):
    inside = {seed: dict(places(logitstore.open(url), 0.25, seed))["target"] for seed in range(20)}
    assert set(inside.values()) == {0, 1, 2, 3}
    (url / "target/tail/c/1").write_bytes(b"")
    for seed, shard in inside.items():
        assert verify(url, "--sample", "0.25", "--seed", str(seed)) == (1 if shard == 1 else 0)
    shown = capsys.readouterr().out
    assert "read 3 of 12 committed shards: all are as committed" in shown
    assert "read 3 of 12 committed shards: 1 are not as committed" in shown


def test_record_beyond_the_store_is_reported_with_the_reason(url):
    path = record(url, "target", 1)
    path.rename(path.with_name(path.name.replace("000001-", "000009-")))
    assert found(url) == ["target/9: a commit record that describes shard 1 of layer 'target'"]
    assert verify(url, "--repair") == 1
    assert found(url) == []


def test_leftovers_of_killed_writers_are_swept(url, made, capsys):
    for path in ("staging/target/000001/0.tail", "staging/target/000001/winner.json", "appends/000000.claim"):
        (url / path).parent.mkdir(parents=True, exist_ok=True)
        (url / path).write_text("{}")
    record(url, "target", 2).unlink()
    other = url / "staging/target/000002/0.tail"  # another writer may be writing this shard
    other.parent.mkdir()
    other.write_text("")
    assert found(url) == []
    assert verify(url, "--repair") == 0
    assert "repaired: leftovers of killed writers: 1 removed" in capsys.readouterr().out
    assert sorted(path.name for path in url.glob("staging/target/*")) == ["000002"]
    assert sweep(logitstore.open(url).storage) == 0


def test_foreign_files_beside_the_records_are_ignored(url):
    for name in ("README", "000001.json.bak", ".DS_Store"):
        (url / "commits/target" / name).write_text("x")
    assert found(url) == []
    (url / "commits/target/000001 (copy).json").write_text("x")
    assert found(url) == ["target: commits/target/000001 (copy).json does not have the name of a commit record"]
    assert verify(url, "--repair") == 1
    assert found(url) == []
    assert (url / "commits/target/README").exists()


def test_damage_repaired_during_verification_is_not_reported(url, made):
    store = logitstore.open(url)
    (url / "target/tail/c/1").write_bytes(b"")

    def mend(_):
        shutil.copyfile(made.url / "target/tail/c/1", url / "target/tail/c/1")

    assert logitstore.verify(store, num_threads=1, progress=mend) == []
    (url / "target/tail/c/1").write_bytes(b"")
    take_back(store.storage, "target", 1)
    assert logitstore.verify(store) == []  # the store was opened before the shard was taken back


def test_repair_can_be_stopped_and_repeated(url, made):
    for shard in range(4):
        (url / "target/tail/c" / str(shard)).write_bytes(b"")
    store = logitstore.open(url)
    problems = logitstore.verify(store)
    assert repair(store, problems[:2]) == ["target/0: uncommitted", "target/1: uncommitted"]
    assert repair(store, problems) == ["target/2: uncommitted", "target/3: uncommitted"]
    assert repair(store, problems) == []


def test_local_cache_hides_no_damage(made, tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(made.url), "/bucket/cached.zarr", recursive=True)
    store = logitstore.open("memory://bucket/cached.zarr", cache_dir=str(tmp_path))
    rows = store.read_shard(1).rows
    memory.pipe("/bucket/cached.zarr/target/tail/c/1", b"")
    np.testing.assert_array_equal(store.read_shard(1).rows.tail_mass, rows.tail_mass)
    assert [(problem.layer, problem.shard) for problem in logitstore.verify(store)] == [("target", 1)]


def test_shard_without_its_record_is_listed_as_not_committed(url, capsys):
    record(url, "target", 2).unlink()
    assert verify(url) == 0
    assert capsys.readouterr().out == (
        "target: 1 of 4 shards are not committed yet (2)\nread 11 committed shards: all are as committed\n"
    )


def test_remote_store_is_repaired_like_a_folder(made, capsys):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(made.url), "/bucket/damaged.zarr", recursive=True)
    url = "memory://bucket/damaged.zarr"
    memory.pipe("/bucket/damaged.zarr/target/tail/c/1", b"")
    memory.rm("/bucket/damaged.zarr/target/counts/zarr.json")
    memory.pipe("/bucket/damaged.zarr/staging/tokens/000001/0.ids", b"")
    memory.pipe("/bucket/damaged.zarr/commits/tokens/000001.json", b"")
    assert verify(url, "--repair") == 1
    shown = capsys.readouterr().out
    for line in (
        "target/1: uncommitted",
        "target/counts/zarr.json: written anew",
        "commits/tokens/000001.json: removed",
        "leftovers of killed writers: 1 removed",
    ):
        assert f"repaired: {line}\n" in shown
    assert missing(url) == {("target", 1)}
    write_missing(url, made)
    assert found(url) == []
    whole = contents(made.url)
    assert {path: memory.cat(f"/bucket/damaged.zarr/{path}") for path in whole} == whole
