"""From stores to batches: contents of a batch, reading ahead, worker processes, and refused stores."""

import pickle
import shutil
import threading
import time
from collections import Counter
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import logitstore
from logitstore.errors import DamagedShardError, IdentityError, LayerNotFoundError
from logitstore.store.reader import Store
from tests.helpers import stores
from tests.helpers.faults import S3Server, s3_options
from tests.helpers.tiny import write_store
from trainer.data.dataset import DocumentDataset
from trainer.data.loader import RankBatches, make_loader
from trainer.data.sharding import Deal

ALL_COLUMNS = ("reference_ce", "initial_ce", "target_entropy", "random")
LOSSES = {"reference_ce": "ref", "initial_ce": "draft"}


@pytest.fixture(scope="module")
def large_store(tmp_path_factory):
    """Twelve shards of random numbers."""
    return stores.make(tmp_path_factory.mktemp("large") / "cache.zarr", num_shards=12, seed=1)


@pytest.fixture(scope="module")
def drawn_store(tmp_path_factory):
    return stores.make(tmp_path_factory.mktemp("drawn") / "cache.zarr", scheme=stores.SAMPLE)


def dataset(*urls, **options):
    return DocumentDataset([logitstore.open(url) for url in urls], **options)


def loader(data, batch=4, *, epoch=0, packs=0, rank=0, ranks=1, **options):
    batches = RankBatches(data.order, Deal(per_device_batch=batch, ranks=ranks), rank)
    batches.begin(epoch, packs)
    return make_loader(data, batches, **options)


def flat(batch):
    """Returns the tensors of a batch by name, including the columns."""
    return {name: value for name, value in batch.items() if name != "columns"} | batch.get("columns", {})


def equal(one, other):
    one, other = flat(one), flat(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("packing", [False, True])
def test_batch_has_the_values_of_the_stores(small_store, large_store, packing):
    options = {"columns": ALL_COLUMNS, "losses": LOSSES, "packing": packing, "pack_length": 30, "seed": 5}
    data = dataset(small_store, large_store, **options)
    opened = [logitstore.open(url) for url in (small_store, large_store)]
    epoch = data.order.epoch(3)
    seen = Counter()
    for places in Deal(per_device_batch=3).batches(len(epoch), 0):
        packs = [epoch[place] for place in places]
        batch = data.collator()([data[pack] for pack in packs])
        width = max(sum(len(opened[p.store][d].ids) for d in p.documents) for p in packs)
        assert batch["input_ids"].shape == (len(packs), width)
        assert ("position_ids" in batch) == packing
        row = number = 0
        for line, pack in enumerate(packs):
            start = 0
            for place in pack.documents:
                seen[pack.store, place] += 1
                store = opened[pack.store]
                document = store[place]
                ids = document.ids.tolist()
                assert batch["input_ids"][line, start : start + len(ids)].tolist() == ids
                if packing:
                    assert batch["position_ids"][line, start : start + len(ids)].tolist() == list(range(len(ids)))
                random = np.random.default_rng([5, 4, 3, pack.store, place]).random(len(ids), dtype=np.float32)
                for t in np.flatnonzero(document.loss_mask):
                    entries = document.rows.slice(t, t + 1)
                    n = len(entries.token_ids)
                    assert int(batch["rows"][row]) == line * width + start + t
                    assert int(batch["documents"][row]) == number
                    assert int(batch["labels"][row]) == ids[t + 1]
                    assert batch["token_ids"][row, :n].tolist() == entries.token_ids.tolist()
                    np.testing.assert_array_equal(batch["probs"][row, :n], np.exp(entries.logprobs))
                    assert not batch["probs"][row, n:].any()
                    assert float(batch["tail"][row]) == document.rows.tail_mass[t]
                    columns = {name: float(values[row]) for name, values in batch["columns"].items()}
                    assert columns == {
                        "reference_ce": store.loss("ref")[place][t], "initial_ce": store.loss("draft")[place][t],
                        "target_entropy": document.rows.entropy[t], "random": random[t],
                    }  # fmt: skip
                    row += 1
                start += len(ids)
                number += 1
            assert not batch["input_ids"][line, start:].any()
            if packing:  # the positions of the padding restart, so it attends to no document
                assert batch["position_ids"][line, start:].tolist() == list(range(width - start))
        assert len(batch["rows"]) == row
    assert seen == Counter({(s, d): 1 for s, store in enumerate(opened) for d in range(len(store))})


def test_batch_tensors_have_fixed_dtypes(small_store):
    batch = next(iter(loader(dataset(small_store, columns=ALL_COLUMNS, losses=LOSSES, packing=True))))
    assert {name: value.dtype for name, value in flat(batch).items()} == {
        "input_ids": torch.int64, "position_ids": torch.int64, "rows": torch.int64, "documents": torch.int64,
        "labels": torch.int64, "token_ids": torch.int64, "probs": torch.float32, "tail": torch.float32,
        "reference_ce": torch.float32, "initial_ce": torch.float32, "target_entropy": torch.float32,
        "random": torch.float32,
    }  # fmt: skip


def test_batch_of_drawn_rows_has_weights_and_entropy(drawn_store):
    data = dataset(drawn_store)
    sample = data.document(0, 4)
    batch = data.collator()([[sample]])
    (counted,) = np.nonzero(sample.loss_mask)
    expected = sample.rows.padded(counted)
    for name in ("token_ids", "probs", "tail", "weights", "entropy"):
        np.testing.assert_array_equal(batch[name], getattr(expected, name))


def test_batch_has_only_the_requested_tensors(small_store, tmp_path):
    names = {"input_ids", "rows", "documents", "labels"}
    assert set(next(iter(loader(dataset(small_store))))) == names | {"token_ids", "probs", "tail"}
    assert set(next(iter(loader(dataset(small_store, reads_target=False))))) == names
    url = Path(stores.copy(small_store, tmp_path / "tokens.zarr"))
    for layer in ("target", "losses"):
        shutil.rmtree(url / layer)
    data = dataset(url, reads_target=False, columns=["random"])
    batches = list(loader(data))
    assert set(flat(batches[0])) == names | {"random"}
    assert sum(len(batch["rows"]) for batch in batches) == logitstore.open(small_store).num_counted


@pytest.mark.parametrize("scheme", ["small_store", "drawn_store"])
def test_empty_batch_has_one_token_and_all_tensors_without_rows(scheme, request):
    data = dataset(request.getfixturevalue(scheme), columns=ALL_COLUMNS, losses=LOSSES, packing=True)
    full, empty = (flat(data.collator()([data[pack] for pack in packs])) for packs in ([data.order.epoch(0)[0]], []))
    assert {name: value.dtype for name, value in empty.items()} == {name: value.dtype for name, value in full.items()}
    assert empty["input_ids"].shape == empty["position_ids"].shape == (1, 1)
    assert {name for name, value in empty.items() if len(value) == 0} == {*full} - {"input_ids", "position_ids"}
    assert empty["token_ids"].shape == empty["probs"].shape == (0, 1)


def test_batch_of_documents_without_counted_rows_has_no_rows(small_store):
    data = dataset(small_store)
    store = data.stores[0]
    # The second document of shard 1 is set aside.
    aside = next(number for number in range(len(store)) if store.locate(number) == (1, 1))
    batch = data.collator()([[data.document(0, aside)]])
    assert batch["rows"].shape == (0,)
    assert batch["input_ids"].shape[1] == len(store[aside].ids)


def test_random_numbers_of_a_row_depend_only_on_seed_document_and_epoch(small_store, large_store):
    def numbers(epoch, **options):
        data = dataset(small_store, large_store, columns=["random"], **options)
        found = {}
        for pack in data.order.epoch(epoch):
            for document, sample in zip(pack.documents, data[pack], strict=True):
                found[pack.store, document] = sample.columns["random"].tolist()
        return found

    plain = numbers(0)
    assert numbers(0, packing=True, pack_length=50, shuffle_window=1) == plain
    assert all(0 <= number < 1 for values in plain.values() for number in values)
    for other in (numbers(1), numbers(0, seed=1)):
        assert other.keys() == plain.keys()
        assert all(other[key] != plain[key] for key in plain)


def test_order_of_documents_is_the_same_with_workers_and_ranks(large_store):
    data = dataset(large_store, packing=True, pack_length=40)
    whole = list(loader(data, epoch=1))
    assert len(whole) == len(loader(data, epoch=1))
    for workers in (1, 2):
        helped = list(loader(data, epoch=1, num_workers=workers))
        assert all(equal(one, other) for one, other in zip(whole, helped, strict=True))
    last = list(loader(data, epoch=1, packs=4 * (len(whole) - 2)))
    assert all(equal(one, other) for one, other in zip(whole[-2:], last, strict=True))
    ranks = [list(loader(data, batch=2, epoch=1, rank=rank, ranks=2)) for rank in range(2)]
    for one, parts in zip(whole, zip(*ranks, strict=True), strict=True):
        rows = [line[line > 0].tolist() for batch in (one, *parts) for line in batch["input_ids"]]
        assert sorted(rows[: len(one["input_ids"])]) == sorted(row for row in rows[len(one["input_ids"]) :] if row)


def test_forked_workers_can_read_a_bucket_after_their_parent(small_store):
    with S3Server() as server:
        server.make_bucket("bucket")
        options = s3_options(server.url)
        fsspec.filesystem("s3", **options).put(f"{small_store}/", "bucket/cache.zarr", recursive=True)
        data = DocumentDataset([logitstore.open("s3://bucket/cache.zarr", options)])
        here = list(loader(data))
        helped = list(loader(data, num_workers=2, persistent_workers=True))
        data.close()
    assert all(equal(one, other) for one, other in zip(here, helped, strict=True))
    assert all(equal(one, other) for one, other in zip(here, loader(dataset(small_store)), strict=True))


def test_loader_keeps_the_random_state_of_the_run(small_store):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(loader(dataset(small_store)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def reads(monkeypatch):
    """A list of (shard, thread name) of all reads, in order."""
    found = []

    def read_shard(store, shard, layers=None, plain=Store.read_shard):
        found.append((shard, threading.current_thread().name))
        return plain(store, shard, layers)

    monkeypatch.setattr(Store, "read_shard", read_shard)
    return found


@pytest.mark.parametrize("window", [1, 2, 4])
def test_every_shard_is_read_once_per_epoch_and_two_windows_are_kept(large_store, reads, window):
    data = dataset(large_store, shuffle_window=window)
    order = list(dict.fromkeys(pack.shard for pack in data.order.epoch(0)))
    for pack in data.order.epoch(0):
        data[pack]
        assert len(data._reader._shards) <= 2 * window
        assert {shard for _, shard in data._reader._shards} >= {shard for _, shard in pack.soon}
    assert all(name.startswith("shards") for _, name in reads)
    assert Counter(shard for shard, _ in reads) == Counter(range(12))
    windows = [set(order[i : i + window]) for i in range(0, 12, window)]
    assert [{shard for shard, _ in reads[i : i + window]} for i in range(0, 12, window)] == windows


def test_next_window_is_read_ahead(large_store, reads):
    data = dataset(large_store, shuffle_window=2)
    first = data.order.epoch(0)[0]
    data[first]
    for key in first.soon:
        data._reader._shards[key].result()
    assert [shard for shard, _ in reads] == [first.shard, *(shard for _, shard in first.soon if shard != first.shard)]
    assert len(reads) == 4


def test_shards_of_a_small_store_are_read_once_for_all_epochs(small_store, reads):
    data = dataset(small_store)
    for epoch in range(3):
        list(loader(data, epoch=epoch))
    assert Counter(shard for shard, _ in reads) == Counter(range(3))
    data.close()
    list(loader(data))
    assert len(reads) == 6


def test_closed_dataset_starts_no_further_read(large_store, monkeypatch):
    found, closed = [], threading.Event()

    def read_shard(store, shard, layers=None, plain=Store.read_shard):
        found.append(shard)
        if len(found) == 2:
            closed.wait()
        return plain(store, shard, layers)

    monkeypatch.setattr(Store, "read_shard", read_shard)
    data = dataset(large_store)
    data[data.order.epoch(0)[0]]
    reader = data._reader
    while len(found) < 2:
        time.sleep(0.001)
    data.close()
    closed.set()
    reader._thread.shutdown(wait=True)
    assert len(found) == 2


def test_damage_found_while_reading_ahead_is_raised_when_the_shard_is_used(large_store, tmp_path):
    url = stores.copy(large_store, tmp_path / "cache.zarr")
    data = dataset(url, shuffle_window=1)
    order = list(dict.fromkeys(pack.shard for pack in data.order.epoch(0)))
    path = Path(url, "target/logprobs/c", str(order[2]))
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    stores.replace(path, bytes(content))
    good = []
    with pytest.raises(DamagedShardError, match=f"shard {order[2]} of layer 'target' is damaged: "):  # noqa: PT012
        for pack in data.order.epoch(0):
            data[pack]
            good.append(pack.shard)
    assert list(dict.fromkeys(good)) == order[:2]
    with pytest.raises(RuntimeError, match=f"shard {order[2]} of layer 'target' is damaged: "):
        list(loader(dataset(url, shuffle_window=1), num_workers=1))


def test_dataset_can_be_pickled(small_store):
    data = dataset(small_store)
    pack = data.order.epoch(0)[0]
    here = data.collator()([data[pack]])
    there = pickle.loads(pickle.dumps(data))
    assert equal(there.collator()([there[pack]]), here)


def test_held_out_documents_are_read_by_number_and_never_trained_on(large_store):
    data = dataset(large_store, eval_fraction=0.3)
    aside = data.order.held_out()
    trained = {(pack.store, document) for pack in data.order.epoch(0) for document in pack.documents}
    assert len(aside) + len(trained) == len(data.stores[0])
    store, document = aside[3]
    assert (store, document) not in trained
    assert data.document(store, document).ids.tolist() == data.stores[0][document].ids.tolist()


def test_unknown_reference_is_refused_and_existing_ones_are_named(small_store):
    expected = r"reference must be one of \['draft', 'ref'\] .* got reference=other"
    with pytest.raises(LayerNotFoundError, match=expected):
        dataset(small_store, columns=["reference_ce"], losses={"reference_ce": "other"})


@pytest.mark.parametrize("column", ["reference_ce", "initial_ce"])
def test_column_without_a_losses_name_is_refused(small_store, column):
    expected = rf"losses must contain {column}, got losses=\{{\}}"
    with pytest.raises(ValueError, match=expected):
        dataset(small_store, columns=[column])


@pytest.mark.parametrize("layer", ["target", "losses/ref"])
def test_stale_shards_are_refused_before_reading(small_store, tmp_path, layer):
    url = stores.copy(small_store, tmp_path / "cache.zarr")
    for shard in (2, 1):
        record = stores.record(url, layer, shard)
        record.rename(record.with_name(f"{record.stem.rpartition('-')[0]}-{'a' * 12}.json"))
    message = (
        rf"layer '{layer}' must be computed from .*, got 2 stale shards in .* \(shard 1 is the first\); run the dump"
    )
    with pytest.raises(IdentityError, match=message):
        dataset(url, columns=["reference_ce"], losses=LOSSES)


def test_incompatible_stores_are_refused(small_store, drawn_store, tmp_path):
    with pytest.raises(ValueError, match="at least one store must be given, got none; add --store"):
        DocumentDataset([])
    expected = f"got kind of entries=truncated in {small_store} and kind of entries=drawn in {drawn_store}; omit one"
    with pytest.raises(ValueError, match=expected):
        dataset(small_store, drawn_store)
    assert len(dataset(small_store, drawn_store, reads_target=False)) > 0
    other = stores.spec_of(1)
    other_url = tmp_path / "other.zarr"
    storage = stores.create(other_url, other)
    stores.write_shard(storage, other, 0, stores.shard_values(np.random.default_rng(0)))
    stores.change_spec(other_url, "", lambda spec: spec["tokenizer"].update(fingerprint="sha256:other"))
    expected = rf"got tokenizer=none \(sha256:none\) in .* and tokenizer=none \(sha256:other\) in {other_url}; omit"
    with pytest.raises(ValueError, match=expected):
        dataset(small_store, other_url, reads_target=False)


def test_stores_with_losses_of_different_models_under_one_name_are_refused(small_store, tmp_path):
    other = shutil.copytree(small_store, tmp_path / "other.zarr")
    stores.change_spec(other, "losses/ref", lambda spec: spec["model"].update(revision="another"))
    options = {"losses": LOSSES, "reads_target": False}
    expected = rf"got model of losses ref=.* in {small_store} and model of losses ref=.* at another in {other}; omit"
    with pytest.raises(ValueError, match=expected):
        dataset(small_store, other, columns=("initial_ce", "reference_ce"), **options)
    assert len(dataset(small_store, other, columns=("initial_ce",), **options)) == 2 * len(dataset(small_store))


def test_columns_have_the_values_of_the_named_losses(tiny, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny.tokenizer)
    target, one, two = (
        AutoModelForCausalLM.from_pretrained(path).eval() for path in (tiny.target, tiny.reference, tiny.draft)
    )
    documents = [([i, *range(3, 20)], [1] * 17 + [0]) for i in range(4)]
    url = write_store(str(tmp_path / "cache.zarr"), documents, target, tokenizer, losses={"ref": one, "first": two})
    store = logitstore.open(url)
    names = {"reference_ce": "ref", "initial_ce": "first"}
    data = DocumentDataset([store], columns=tuple(names), losses=names)
    batch = data.collator()([[data.document(0, number)] for number in range(4)])
    found = {}
    for column, name in names.items():
        expected = [store.loss(name)[number][store[number].loss_mask] for number in range(4)]
        found[column] = batch["columns"][column].numpy()
        np.testing.assert_array_equal(found[column], np.concatenate(expected))
    assert not np.array_equal(*found.values())
