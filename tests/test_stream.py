"""Store -> batches: what is in a batch, and which documents come when, on which rank."""

import dataclasses
import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import TrainerState

import logitstore
from logitstore.errors import IdentityError, LayerNotFoundError
from trainer.draft_trainer import _TellEpoch
from trainer.stream import DocumentDataset, WindowShuffleSampler, collate

COUNTS = st.lists(st.integers(0, 9), min_size=1, max_size=12)


@given(COUNTS, st.integers(1, 4), st.integers(0, 2**32 - 1), st.integers(0, 50))
@settings(max_examples=80, deadline=None)
def test_an_epoch_holds_every_document_once_and_is_repeatable(counts, window, seed, epoch):
    sampler = WindowShuffleSampler(counts, window, seed)
    sampler.set_epoch(epoch)
    order = list(sampler)
    again = WindowShuffleSampler(counts, window, seed)
    again.set_epoch(epoch)
    assert sorted(order) == list(range(sum(counts)))
    assert len(sampler) == sum(counts)
    assert list(again) == order


@given(COUNTS, st.integers(1, 4), st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_documents_stay_within_a_window_of_shards(counts, window, seed):
    shard_of = np.repeat(np.arange(len(counts)), counts)
    # maximal runs of shards: at no time are more than `window` shards begun and not finished
    left, opened = dict(enumerate(counts)), set()
    for document in WindowShuffleSampler(counts, window, seed):
        shard = int(shard_of[document])
        opened.add(shard)
        left[shard] -= 1
        assert len(opened) <= window
        if all(left[other] == 0 for other in opened):
            opened.clear()


def test_epochs_and_seeds_give_other_orders():
    sampler = WindowShuffleSampler([20] * 6, 4, 7)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    orders.append(list(WindowShuffleSampler([20] * 6, 4, 8)))
    assert all(a != b for a, b in itertools.combinations(orders, 2))


@pytest.mark.parametrize("window", [0, 5])
def test_a_window_that_does_not_fit_the_cache_is_refused(window):
    with pytest.raises(ValueError, match=f"shuffle_window must be between 1 and 4, .* got shuffle_window={window}"):
        WindowShuffleSampler([3], window)


def documents_by_rank(num_documents, ranks, *, epoch=0, skip=0):
    """What accelerate hands to each rank, by its own sharding of batches."""
    orders = []
    for rank in range(ranks):
        sampler = WindowShuffleSampler([num_documents // 4] * 4, 2, 3)
        loader = DataLoader(range(num_documents), batch_size=2, sampler=sampler, collate_fn=list)
        loader = prepare_data_loader(loader, num_processes=ranks, process_index=rank)
        if skip:  # resumed in mid-epoch
            loader = skip_first_batches(loader, skip)
            _TellEpoch(sampler).on_epoch_begin(None, TrainerState(epoch=epoch + 0.5), None)
        loader.set_epoch(epoch)
        orders.append([document for batch in loader for document in batch])
    return orders


def test_two_ranks_get_disjoint_documents_that_make_up_the_epoch():
    first, second = documents_by_rank(32, 2)
    assert not set(first) & set(second)
    assert sorted(first + second) == list(range(32))


def test_the_epoch_reaches_the_sampler_through_accelerate():
    assert documents_by_rank(32, 1, epoch=0) != documents_by_rank(32, 1, epoch=1)
    assert documents_by_rank(32, 2, epoch=0) != documents_by_rank(32, 2, epoch=1)


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_resumed_in_mid_epoch_go_on_with_that_epoch(ranks):
    whole, resumed = documents_by_rank(32, ranks, epoch=1), documents_by_rank(32, ranks, epoch=1, skip=3)
    assert resumed == [documents[6:] for documents in whole]


def dataset(url, reference="reference"):
    return DocumentDataset(logitstore.open(url), reference)


def test_a_batch_holds_what_the_store_holds(tiny_store):
    store = logitstore.open(tiny_store)
    chosen = [5, 0, 17]
    data = dataset(tiny_store)
    batch = collate([data[i] for i in chosen])
    width = max(len(store[i].ids) for i in chosen)
    assert batch["input_ids"].shape == (3, width)
    row = 0
    for b, number in enumerate(chosen):
        document, ce = store[number], store.loss("reference")[number]
        assert batch["input_ids"][b, : len(document.ids)].tolist() == document.ids.tolist()
        assert not batch["input_ids"][b, len(document.ids) :].any()
        for t in np.flatnonzero(document.loss_mask):
            entries = document.rows.slice(t, t + 1)
            n = len(entries.token_ids)
            assert int(batch["rows"][row]) == b * width + t
            assert batch["token_ids"][row, :n].tolist() == entries.token_ids.tolist()
            np.testing.assert_array_equal(batch["probs"][row, :n], np.exp(entries.logprobs))
            assert not batch["probs"][row, n:].any()
            assert float(batch["tail"][row]) == document.rows.tail_mass[t]
            assert int(batch["labels"][row]) == document.ids[t + 1]
            assert float(batch["reference_ce"][row]) == ce[t]
            row += 1
    assert len(batch["rows"]) == row
    assert {name: value.dtype for name, value in batch.items()} == {
        "input_ids": torch.int64, "rows": torch.int64, "token_ids": torch.int64, "probs": torch.float32,
        "tail": torch.float32, "labels": torch.int64, "reference_ce": torch.float32,
    }  # fmt: skip


def test_without_a_reference_a_batch_has_no_losses_of_one(tiny_store):
    assert "reference_ce" not in collate([dataset(tiny_store, None)[0]])


def test_a_batch_without_any_masked_row_is_empty_of_rows(tiny_store):
    sample = dataset(tiny_store)[0]
    batch = collate([dataclasses.replace(sample, loss_mask=np.zeros_like(sample.loss_mask))])
    assert batch["rows"].shape == (0,)
    assert batch["probs"].shape == (0, 1)


def test_documents_come_in_the_same_order_with_and_without_workers(tiny_store):
    data = dataset(tiny_store)
    batches = []
    for workers in (0, 2):
        sampler = WindowShuffleSampler(data.documents_per_shard, 2, 11)
        loader = DataLoader(data, batch_size=5, sampler=sampler, collate_fn=collate, num_workers=workers)
        batches.append(list(loader))
    for alone, helped in zip(*batches, strict=True):
        assert alone.keys() == helped.keys()
        assert all(torch.equal(alone[name], helped[name]) for name in alone)


def test_an_unknown_reference_is_refused_with_those_there_are(tiny_store):
    with pytest.raises(LayerNotFoundError, match=r"reference must be one of \['reference'\] .* got reference=other"):
        dataset(tiny_store, "other")


@pytest.mark.parametrize("layer", ["target", "losses/reference"])
def test_stale_shards_are_refused_before_any_is_read(tiny_store, tmp_path, layer):
    url = shutil.copytree(tiny_store, tmp_path / "cache.zarr")
    for shard in (2, 1):
        (record,) = Path(url, "commits", layer).glob(f"{shard:06d}-*")
        record.rename(record.with_name(f"{record.stem.rpartition('-')[0]}-{'a' * 12}.json"))
    message = (
        rf"layer '{layer}' must be computed from .*, got 2 stale shards in .* \(shard 1 is the first\); run the dump"
    )
    with pytest.raises(IdentityError, match=message):
        dataset(url)
