"""Appends to a finished store: readers see all new documents at once, and no document is appended twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import logitstore
from logitstore.documents.prepare import prepare
from logitstore.dump.worker import ShardDumper
from logitstore.errors import FormatError, IdentityError, LayerNotFoundError
from logitstore.format.schemes import Scheme
from logitstore.format.spec import LossSpec, ModelSpec, TargetSpec
from logitstore.models.loading import ModelSource
from logitstore.storage.storage import Storage
from logitstore.store.commits import protocol
from logitstore.store.commits.appends import FOLDER
from logitstore.store.writer import add_layer
from tests.helpers.tiny import functions, write_jsonl

SIZES = {"max_length": 64, "shard_rows": 128, "num_proc": 1, "progress": False}


@pytest.fixture(scope="module")
def tokenizer(tiny):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny.tokenizer)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three files of different documents."""
    folder = tmp_path_factory.mktemp("data")
    pairs = functions(18)
    return [write_jsonl(folder / f"{i}.jsonl", pairs[6 * i : 6 * i + 6]) for i in range(3)]


def run(url, file, tokenizer, *, append=False):
    return prepare(Storage(url), file, tokenizer, append=append, **SIZES)


def documents(store):
    return [(document.ids.tolist(), document.loss_mask.tolist()) for document in store]


def payload(url):
    return {
        str(path.relative_to(url)): path.read_bytes()
        for path in sorted(Path(url).rglob("*"))
        if path.is_file() and "commits" not in path.parts
    }


def dump(url, tiny, *layers):
    """Adds layers and computes their missing shards, as the dump job does but without Ray. Returns the shards."""
    storage = Storage(url)
    spec = logitstore.open(url).spec
    model = ModelSpec(name="m", revision="0", dtype="float32", padded_vocab_size=520)
    for layer in layers:
        made = TargetSpec(model=model, scheme=Scheme(k=8)) if layer == "target" else LossSpec(model=model)
        add_layer(storage, spec, layer, made)
    dumper = ShardDumper(
        storage,
        ModelSource(name=tiny.target) if "target" in layers else None,
        {layer.partition("/")[2]: ModelSource(name=tiny.reference) for layer in layers if layer != "target"},
        batch_tokens=256,
        device="cpu",
    )
    store = logitstore.open(url)
    done = []
    for shard in range(store.num_shards):
        if missing := [layer for layer in layers if shard not in store.layers[layer].index]:
            dumper.dump(shard, missing)
            done.append(shard)
    return done


def test_appended_documents_follow_the_existing_ones(tmp_path, tokenizer, data):
    url = tmp_path / "c.zarr"
    first = run(url, data[0], tokenizer)
    before = documents(first)
    kept = {path: path.stat().st_mtime_ns for path in Path(url).rglob("*") if path.is_file() and path.parts[-2] == "c"}
    both = run(url, data[1], tokenizer, append=True)
    alone = run(tmp_path / "alone.zarr", data[1], tokenizer)
    assert documents(both) == before + documents(alone)
    assert both.num_shards == first.num_shards + alone.num_shards == both.spec.num_shards
    assert (both.num_rows, both.num_counted) == (first.num_rows + alone.num_rows, first.num_counted + alone.num_counted)
    assert [append.data.source for append in both.spec.appends] == [data[1]]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert logitstore.verify(both) == []
    third = run(url, data[2], tokenizer, append=True)
    assert [append.first_shard for append in third.spec.appends] == [first.num_shards, both.num_shards]
    assert documents(third)[: len(both)] == documents(both)
    # A reader that opened the store earlier still sees the same documents and values.
    assert len(first) == len(before) < len(both) < len(third)
    assert documents(first) == before
    with pytest.raises(IndexError):
        first[len(before)]


def test_the_same_documents_are_never_appended_twice(tmp_path, tokenizer, data):
    url = tmp_path / "c.zarr"
    run(url, data[0], tokenizer)
    for file in (data[0], data[1], data[1], data[0]):
        run(url, file, tokenizer, append=True)
    renamed = str(shutil.copy(data[1], tmp_path / "another name.jsonl"))  # recognised by its documents, not its name
    both = run(url, renamed, tokenizer, append=True)
    assert len(both.spec.appends) == 1
    assert len({str(document) for document in documents(both)}) == len(both)
    # Without --append, data that the store has is found, and other data is refused.
    assert len(run(url, data[1], tokenizer)) == len(both)
    with pytest.raises(
        IdentityError,
        match=rf"got data={data[2]} with others .*; give --append to add",
    ):
        run(url, data[2], tokenizer)


def test_file_that_overlaps_in_part_is_appended_in_full(tmp_path, tokenizer, data):
    url = tmp_path / "c.zarr"
    before = run(url, data[0], tokenizer)
    more = tmp_path / "more.jsonl"
    more.write_text(Path(data[0]).read_text() + Path(data[1]).read_text())
    both = run(url, str(more), tokenizer, append=True)
    assert documents(both)[: 2 * len(before)] == 2 * documents(before)


def test_killed_append_is_invisible_and_can_be_continued(tmp_path, tokenizer, data, monkeypatch):
    url = tmp_path / "c.zarr"
    before = documents(run(url, data[0], tokenizer))
    whole = tmp_path / "whole.zarr"
    run(whole, data[0], tokenizer)
    total = run(whole, data[1], tokenizer, append=True).num_shards
    shards = total - logitstore.open(url).num_shards
    assert shards >= 3
    committed = []
    real = protocol.publish

    def killed(storage, commit, objects):
        if len(committed) % 2 == 1:
            committed.append("killed")
            raise KeyboardInterrupt
        committed.append(commit.shard)
        return real(storage, commit, objects)

    with monkeypatch.context() as patch:
        patch.setattr(protocol, "publish", killed)
        for _ in range(shards - 1):
            with pytest.raises(KeyboardInterrupt):
                run(url, data[1], tokenizer, append=True)
            assert documents(logitstore.open(url)) == before
            assert logitstore.verify(logitstore.open(url)) == []
    with pytest.raises(IdentityError, match=rf"an append of {data[1]} .* so {data[2]} .*; finish the other"):
        run(url, data[2], tokenizer, append=True)
    store = run(url, data[1], tokenizer, append=True)
    assert [shard for shard in committed if shard != "killed"] == list(range(total - shards, total - 1))
    assert payload(url) == payload(whole)
    assert documents(store) == documents(logitstore.open(whole))
    run(url, data[2], tokenizer, append=True)


def test_append_to_incomplete_tokens_is_refused(tmp_path, tokenizer, data):
    url = tmp_path / "c.zarr"
    run(url, data[0], tokenizer)
    record = next(Path(url, "commits/tokens").glob("000001-*"))
    record.unlink()
    with pytest.raises(LayerNotFoundError, match=rf"got 1 shards of {data[0]} missing .*; give --data {data[0]}"):
        run(url, data[1], tokenizer, append=True)
    run(url, data[0], tokenizer)
    assert record.is_file()
    run(url, data[1], tokenizer, append=True)


def test_a_damaged_shard_of_an_append_is_written_again_from_its_own_data(tmp_path, tokenizer, data):
    url = tmp_path / "c.zarr"
    run(url, data[0], tokenizer)
    store = run(url, data[1], tokenizer, append=True)
    wanted = payload(url)
    last = store.num_shards - 1
    next(Path(url, "commits/tokens").glob(f"{last:06d}-*")).unlink()
    Path(url, "tokens/ids/c", str(last)).write_bytes(b"")
    assert run(url, data[0], tokenizer).num_shards == last
    assert run(url, data[1], tokenizer, append=True).num_shards == store.num_shards
    assert payload(url) == wanted


def test_layers_computed_after_an_append_equal_those_of_a_store_made_at_once(tmp_path, tiny, tokenizer, data):
    url = tmp_path / "c.zarr"
    first = run(url, data[0], tokenizer)
    assert dump(url, tiny, "target", "losses/ref") == list(range(first.num_shards))
    rows = logitstore.open(url)[0].rows
    grown = run(url, data[1], tokenizer, append=True)
    partly = logitstore.open(url)
    assert partly.layers["target"].missing == list(range(first.num_shards, grown.num_shards))
    np.testing.assert_array_equal(partly[0].rows.token_ids, rows.token_ids)
    with pytest.raises(LayerNotFoundError, match=rf"got shard={grown.num_shards - 1} of layer 'target'"):
        partly[len(partly) - 1]
    assert dump(url, tiny, "target", "losses/ref") == list(range(first.num_shards, grown.num_shards))
    late = tmp_path / "late.zarr"
    run(late, data[0], tokenizer)
    run(late, data[1], tokenizer, append=True)
    dump(late, tiny, "target", "losses/ref")
    assert payload(url) == payload(late)
    store = logitstore.open(url)
    assert logitstore.verify(store) == []
    assert np.isfinite(store.loss("ref")[len(store) - 1][store[len(store) - 1].loss_mask]).all()
    import zarr

    assert zarr.open_array(url / "target/counts", mode="r").shape == (grown.num_shards * store.spec.shard_rows,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"first_shard": 7}, r"must begin at shard \d+, got first_shard=7"),
        (lambda a: a | {"num_shards": 10**18}, "num_shards=1000000000000000000"),
        (lambda a: a | {"num_shards": -1}, "num_shards=-1"),
        (lambda a: a | {"more": 1}, "known fields only, got 'more'"),
        (lambda _: [], "must be a JSON object"),
    ],
)
def test_a_malformed_append_is_refused(tmp_path, tokenizer, data, change, message):
    url = tmp_path / "c.zarr"
    run(url, data[0], tokenizer)
    run(url, data[1], tokenizer, append=True)
    record = url / FOLDER / "000001.json"
    record.write_text(json.dumps(change(json.loads(record.read_text()))))
    with pytest.raises(FormatError, match=message):
        logitstore.open(url)
