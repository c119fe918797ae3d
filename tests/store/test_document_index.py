"""The index of documents: lengths and digests by number, in stores that grow, are damaged or contain false values."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

import logitstore
from logitstore.commands import main as cli
from logitstore.documents.prepare import prepare
from logitstore.errors import DamagedShardError, LayerNotFoundError
from logitstore.format.schemes import Scheme
from logitstore.inspection.verify import check_shard
from logitstore.rows.tokens import document_digests, encode_tokens
from logitstore.storage.storage import Storage
from logitstore.store import reader
from tests.helpers import stores
from tests.helpers.faults import FaultyProxy, S3Server, s3_options
from tests.helpers.golden import document_digest
from tests.helpers.tiny import functions, write_jsonl


@pytest.fixture
def url(small_store, tmp_path):
    """A store that a test may damage: three shards of random numbers, with one document of shard 1 set aside."""
    return stores.copy(small_store, tmp_path / "cache.zarr")


def same(found, expected):
    for name in ("lengths", "digests", "first_document"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    return True


def test_index_has_the_lengths_and_digests_of_the_documents(tiny_store):
    store = logitstore.open(tiny_store)
    index = store.documents()
    assert (index.lengths.dtype, index.digests.dtype, len(index)) == (np.int64, np.uint64, len(store))
    assert index.lengths.tolist() == [len(document.ids) for document in store]
    assert index.digests.tolist() == [document_digest(document.ids, document.loss_mask) for document in store]
    assert index.documents_per_shard.tolist() == [len(shard) for shard in store.shards(layers=())]
    for document in range(len(store)):
        shard, place = store.locate(document)
        assert index.first_document[shard] + place == document < index.first_document[shard + 1]


def test_documents_set_aside_keep_their_place_in_the_index(small_store):
    store = logitstore.open(small_store)
    assert store.reader.commit("target", 1).set_aside
    index, (start, stop) = store.documents(), (10, 17)
    assert index.first_document[1:3].tolist() == [start, stop]
    values = store.reader.read_arrays("tokens", 1)
    parts = [np.split(values[name], np.cumsum(values["lengths"])[:-1]) for name in ("ids", "loss_mask")]
    assert index.digests[start:stop].tolist() == [document_digest(*document) for document in zip(*parts, strict=True)]


@pytest.mark.parametrize("at_once", [1, 2, 3, 100])
def test_index_does_not_depend_on_the_number_of_shards_read_at_once(small_store, monkeypatch, at_once):
    expected = logitstore.open(small_store).documents()
    monkeypatch.setattr(reader, "SHARDS_AT_ONCE", at_once)
    assert same(logitstore.open(small_store).documents(), expected)


def test_digest_depends_only_on_ids_and_mask():
    ids, mask = np.array([7, 8, 9, 7, 8, 9, 7, 8, 9, 7, 8]), np.array([0, 1, 0, 0, 1, 0, 1, 1, 0, 1, 0])
    first, again, other_mask, shorter = encode_tokens(ids, mask, np.array([3, 3, 3, 2]))["digests"].tolist()
    assert first == again
    assert len({first, other_mask, shorter}) == 3
    assert document_digest([7, 8, 9], [0, 1, 0]) == first


def test_encoding_no_documents_gives_empty_arrays():
    nothing = np.zeros(0, np.int64)
    assert [(name, values.dtype.str, len(values)) for name, values in encode_tokens(*[nothing] * 3).items()] == [
        ("ids", "<u4", 0), ("loss_mask", "|u1", 0), ("lengths", "<u4", 0), ("digests", "<u8", 0),
    ]  # fmt: skip


def test_digests_are_uniform():
    """The share of digests below a fraction of 2**64 equals that fraction within 5 standard errors."""
    num, fraction = 20_000, 0.05
    digests = encode_tokens(np.arange(2 * num), np.tile([1, 0], num), np.full(num, 2))["digests"]
    assert len(set(digests.tolist())) == num
    chosen = (digests < fraction * 2.0**64).mean()
    assert abs(chosen - fraction) < 5 * (fraction * (1 - fraction) / num) ** 0.5


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two files of different documents, and one of both in another order."""
    folder = tmp_path_factory.mktemp("data")
    parts = functions(6), functions(14)[6:]
    return [write_jsonl(folder / f"{i}.jsonl", pairs) for i, pairs in enumerate((*parts, parts[1] + parts[0]))]


def test_digests_are_kept_by_appends_and_equal_in_every_store(data, tokenizer, tmp_path):
    def dump(name, file, shard_rows=128, *, append=False):
        options = {"max_length": 64, "shard_rows": shard_rows, "num_proc": 1, "progress": False}
        return prepare(Storage(tmp_path / name), file, tokenizer, append=append, **options)

    before = dump("a", data[0])
    first = before.documents()
    whole = dump("a", data[1], append=True).documents()
    assert same(before.documents(), first)
    n = len(first)
    assert n < len(whole)
    np.testing.assert_array_equal(whole.digests[:n], first.digests)
    np.testing.assert_array_equal(whole.lengths[:n], first.lengths)
    np.testing.assert_array_equal(whole.first_document[: len(first.first_document)], first.first_document)
    other = dump("b", data[2], shard_rows=200).documents()
    assert sorted(other.digests.tolist()) == sorted(whole.digests.tolist())
    length_of = dict(zip(whole.digests.tolist(), whole.lengths.tolist(), strict=True))
    assert [length_of[digest] for digest in other.digests.tolist()] == other.lengths.tolist()


def test_view_with_a_smaller_scheme_has_the_same_documents(small_store):
    store = logitstore.open(small_store)
    assert same(logitstore.open(small_store, scheme=Scheme(k=2)).documents(), store.documents())
    assert same(pickle.loads(pickle.dumps(store)).documents(), store.documents())


def test_store_without_shards_has_no_documents(tmp_path):
    stores.create(tmp_path / "cache.zarr", stores.spec_of(3))
    index = logitstore.open(tmp_path / "cache.zarr").documents()
    assert (len(index), index.first_document.tolist(), index.documents_per_shard.tolist()) == (0, [0], [])
    assert (index.lengths.dtype, index.digests.dtype) == (np.int64, np.uint64)


def test_index_reads_no_ids_masks_or_other_layers(url):
    expected = logitstore.open(url).documents()
    for path in ("tokens/ids/c", "tokens/loss_mask/c", "target/counts", "target/gaps", "commits/losses"):
        shutil.rmtree(Path(url, path))
    assert same(logitstore.open(url).documents(), expected)


@pytest.mark.parametrize("array", ["lengths", "digests"])
@pytest.mark.parametrize("damage", ["flipped", "gone", "of another shard"])
def test_index_names_the_layer_and_shard_of_a_damaged_object(url, array, damage):
    victim = Path(url, "tokens", array, "c/1")
    data = bytearray(victim.read_bytes())
    victim.unlink()
    if damage == "flipped":
        data[20] ^= 1
        victim.write_bytes(data)
    if damage == "of another shard":
        shutil.copyfile(victim.with_name("2"), victim)
    with pytest.raises(DamagedShardError, match=f"shard 1 of layer 'tokens'.*{array}"):
        logitstore.open(url).documents()
    assert cli.main(["verify", "--repair", url]) == 1
    assert logitstore.open(url).layers["tokens"].missing == [1]


def test_index_checks_commit_records(url):
    store = logitstore.open(url)
    record = stores.record(url, "tokens", 2)
    content = record.read_bytes()
    stores.replace(record, content.replace(b'"rows"', b'"rowz"'))
    with pytest.raises(DamagedShardError, match=r"shard 2 of layer 'tokens'.*missing or unknown fields"):
        store.documents()
    record.unlink()
    with pytest.raises(LayerNotFoundError, match=r"got shard=2 .*taken back since the store was opened"):
        store.documents()
    record.with_name(record.name.replace("-0e-", "-1e-")).write_bytes(content)
    record.write_bytes(content)
    with pytest.raises(DamagedShardError, match=r"shard 2 of layer 'tokens'.*several commit records"):
        logitstore.open(url).documents()


def test_record_without_digests_is_refused(url):
    def forget(value):
        del value["checksums"]["digests"]

    stores.change_record(url, "tokens", 1, forget)
    store = logitstore.open(url)
    for read in (store.documents, lambda: store.read_shard(1)):
        with pytest.raises(DamagedShardError, match=r"shard 1 of layer 'tokens'.*whose checksums are not those"):
            read()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x: np.append(x[:-2], [0, x[-1] + x[-2]]), "length outside 1 to 12 tokens"),
        (lambda x: x + np.arange(len(x)), "lengths that add up to .* rows, not"),
    ],
    ids=["of no token", "beyond the shard"],
)
def test_impossible_lengths_with_valid_checksums_are_refused(url, change, reason):
    stores.change_values(url, "tokens", 1, lengths=lambda x: change(x).astype(np.uint32))
    with pytest.raises(DamagedShardError, match=f"shard 1 of layer 'tokens'.*{reason}"):
        logitstore.open(url).documents()


def test_verify_finds_a_wrong_digest_of_a_document(url):
    stores.change_values(url, "tokens", 1, digests=lambda x: np.append(x[:3], x[:2:-1]))
    store = logitstore.open(url)
    store.documents()
    problem = check_shard(store, "tokens", 1)
    assert (problem.layer, problem.shard) == ("tokens", 1)
    assert problem.reason == "4 documents that differ from their digests, the first of them document 3"
    assert [(p.layer, p.shard) for p in logitstore.verify(store)] == [("tokens", 1)]
    stores.change_values(url, "tokens", 1, digests=lambda x: np.append(x[:3], x[:2:-1]))
    assert logitstore.verify(logitstore.open(url)) == []


def test_digests_of_false_lengths_use_only_existing_ids():
    ids, mask = np.arange(5, dtype=np.uint32), np.zeros(5, np.uint8)
    found = document_digests(ids, mask, np.array([3, 2**32 - 1, 7], np.uint32))
    assert found.tolist() == [document_digest([0, 1, 2], [0] * 3), document_digest([3, 4], [0] * 2),
                              document_digest([], [])]  # fmt: skip


def test_index_reads_three_objects_per_shard_and_caches_them(small_store, tmp_path):
    with S3Server() as server, FaultyProxy(server.url) as proxy:
        server.make_bucket("bucket")
        options = s3_options(proxy.url)
        bucket = Storage("s3://bucket/cache.zarr", options)

        def upload(url):
            for path in Path(url).rglob("*"):
                if path.is_file():
                    bucket.put(path.relative_to(url).as_posix(), path.read_bytes())

        upload(small_store)
        store = logitstore.open("s3://bucket/cache.zarr", options, cache_dir=str(tmp_path / "cache"))
        expected = logitstore.open(small_store).documents()
        before = proxy.counts.copy()
        assert same(store.documents(), expected)
        assert proxy.counts - before == {"GET": 9}
        before = proxy.counts.copy()
        assert same(store.documents(), expected)
        assert proxy.counts == before

        # Another store at the same URL, with objects of the same names.
        bucket.for_each(bucket.remove, [f"commits/tokens/{name}" for name in bucket.names("commits/tokens")])
        other = stores.make(tmp_path / "other", seed=1)
        upload(other)
        store = logitstore.open("s3://bucket/cache.zarr", options, cache_dir=str(tmp_path / "cache"))
        assert same(store.documents(), logitstore.open(other).documents())
