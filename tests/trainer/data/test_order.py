"""The order of documents: the packs of an epoch, their order, and the share of each rank."""

import itertools
import math
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitstore.store.documents import DocumentIndex
from trainer.data.order import PackOrder
from trainer.data.sharding import Deal, Position

COUNTS = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any)
SEEDS = st.integers(0, 2**32 - 1)
DEALS = st.builds(
    Deal, per_device_batch=st.integers(1, 3), ranks=st.integers(1, 3), accumulation=st.integers(1, 3),
    drop_last=st.booleans(),
)  # fmt: skip


def index(documents_per_shard, seed=0, lengths=None):
    rng = np.random.default_rng(seed)
    num = sum(documents_per_shard)
    return DocumentIndex(
        lengths=rng.integers(1, 100, num) if lengths is None else np.asarray(lengths),
        digests=rng.integers(0, 2**64, num, dtype=np.uint64),
        first_document=np.cumsum([0, *documents_per_shard]),
    )


def documents(epoch):
    return [(pack.store, document) for pack in epoch for document in pack.documents]


@given(COUNTS, st.integers(1, 4), SEEDS, st.integers(0, 50), st.booleans())
@settings(max_examples=60, deadline=None)
def test_epoch_has_every_document_once_and_is_repeatable(counts, window, seed, epoch, packing):
    options = {"shuffle_window": window, "seed": seed, "packing": packing}
    order = PackOrder([index(counts)], **options)
    found = documents(order.epoch(epoch))
    assert sorted(found) == [(0, document) for document in range(sum(counts))]
    assert len(order.epoch(epoch)) == order.packs_per_epoch
    assert documents(PackOrder([index(counts)], **options).epoch(epoch)) == found


@given(COUNTS, st.integers(1, 4), st.integers(0, 99), st.booleans())
@settings(max_examples=60, deadline=None)
def test_documents_come_from_at_most_a_window_of_open_shards(counts, window, seed, packing):
    order = PackOrder([index(counts)], shuffle_window=window, seed=seed, packing=packing)
    shard_of = np.repeat(np.arange(len(counts)), counts)
    # At no time are more than `window` shards started and not finished.
    left, opened = dict(enumerate(counts)), set()
    for pack in order.epoch(3):
        assert set(shard_of[list(pack.documents)]) == {pack.shard}
        left[pack.shard] -= len(pack.documents)
        opened.add(pack.shard)
        assert len(opened) <= window
        if all(left[other] == 0 for other in opened):
            opened.clear()


def test_soon_lists_the_shards_of_this_window_and_the_next():
    packs = list(PackOrder([index([3] * 9)], shuffle_window=2, seed=1).epoch(0))
    windows = [tuple(dict.fromkeys(pack.shard for pack in packs[i : i + 6])) for i in range(0, 27, 6)]
    for i, pack in enumerate(packs):
        soon = [shard for store, shard in pack.soon]
        expected = [set(window) for window in windows[i // 6 : i // 6 + 2]]
        assert set(soon[:2]) == expected[0] if len(expected[0]) == 2 else expected[0] <= set(soon)
        assert set(soon) == set().union(*expected)


def test_every_epoch_and_seed_has_its_own_order():
    orders = [documents(PackOrder([index([20] * 6)], seed=seed).epoch(epoch)) for seed in (0, 7) for epoch in range(3)]
    assert all(a != b for a, b in itertools.combinations(orders, 2))


@given(
    st.lists(st.tuples(COUNTS, st.floats(0.05, 3.0)), min_size=1, max_size=3), SEEDS, st.integers(1, 4), st.booleans()
)
@settings(max_examples=60, deadline=None)
def test_epochs_of_weighted_stores_have_equal_length_and_cover_each_store_evenly(stores, seed, window, packing):
    weights = [weight for _, weight in stores]
    indexes = [index(counts, i) for i, (counts, _) in enumerate(stores)]
    options = {"packing": packing, "pack_length": 100}
    order = PackOrder(indexes, weights=weights, seed=seed, shuffle_window=window, **options)
    epochs = [list(order.epoch(epoch)) for epoch in range(7)]
    assert {len(epoch) for epoch in epochs} == {order.packs_per_epoch}
    for store, (_, weight) in enumerate(stores):
        # All packs of a store come equally often, except for the pass that is not finished.
        seen = [Counter(pack.documents for pack in epoch if pack.store == store) for epoch in epochs]
        every = PackOrder([indexes[store]], **options).packs_per_epoch
        assert {sum(epoch.values()) for epoch in seen} == {max(1, round(weight * every))}
        for stop in range(1, 8):
            total = sum(seen[:stop], Counter())
            times = sum(total.values()) / every
            assert math.floor(times) <= min(total.values())
            assert max(total.values()) <= math.ceil(times)
            assert len(total) == every or times < 1


def test_store_of_weight_one_half_is_covered_once_in_two_epochs():
    order = PackOrder([index([4, 6]), index([5, 3, 2], 1)], weights=[1.0, 0.5], seed=3)
    first, second = (documents(order.epoch(epoch)) for epoch in (4, 5))
    assert len(first) == len(second) == 15
    assert sorted(d for d in first + second if d[0] == 1) == [(1, document) for document in range(10)]


def test_shards_of_all_stores_are_mixed():
    order = PackOrder([index([5] * 8), index([5] * 8, 1)], seed=0, shuffle_window=1)
    stores = [pack.store for pack in order.epoch(0)][::5]
    assert sum(a != b for a, b in itertools.pairwise(stores)) > 0
    assert Counter(stores) == {0: 8, 1: 8}


@given(COUNTS, st.floats(0, 0.9), SEEDS)
@settings(max_examples=60, deadline=None)
def test_held_out_documents_are_in_no_pack_and_all_others_are(counts, fraction, seed):
    stores = [index(counts, seed), index([30], seed + 1)]
    try:
        order = PackOrder(stores, eval_fraction=fraction, packing=True)
    except ValueError as error:
        assert str(error).startswith("stores must have documents to train on")  # noqa: PT017
        return
    aside = order.held_out()
    expected = [(s, d) for s, i in enumerate(stores) for d in range(len(i)) if int(i.digests[d]) < fraction * 2**64]
    assert aside == expected
    lowest = sorted(expected, key=lambda found: int(stores[found[0]].digests[found[1]]))[:2]
    assert order.held_out(2) == sorted(lowest)
    everything = {(s, d) for s, i in enumerate(stores) for d in range(len(i))}
    assert set(documents(order.epoch(0))) == everything - set(aside)


def test_held_out_documents_stay_held_out_when_a_store_grows():
    grown = index([50, 70, 10])
    before = DocumentIndex(
        lengths=grown.lengths[:120], digests=grown.digests[:120], first_document=grown.first_document[:3]
    )
    small, large = (set(PackOrder([i], eval_fraction=0.2).held_out()) for i in (before, grown))
    assert 0 < len(small) < 120
    assert small == {(store, document) for store, document in large if document < 120}


def test_equal_documents_are_held_out_of_all_stores():
    shared = index([40])
    order = PackOrder([shared, shared], eval_fraction=0.5)
    assert {d for s, d in order.held_out() if s == 0} == {d for s, d in order.held_out() if s == 1}


@given(st.integers(0, 60), DEALS)
@settings(max_examples=200, deadline=None)
def test_ranks_share_every_step_evenly_and_lose_no_pack(packs, deal):
    by_rank = [list(deal.batches(packs, rank)) for rank in range(deal.ranks)]
    assert {len(batches) for batches in by_rank} == {deal.num_batches(packs)}
    used = deal.num_steps(packs) * deal.packs_per_step if deal.drop_last else packs
    assert sorted(place for batches in by_rank for batch in batches for place in batch) == list(range(used))
    for number, batches in enumerate(zip(*by_rank, strict=True)):
        sizes = [len(batch) for batch in batches]
        assert max(sizes) <= deal.per_device_batch
        assert max(sizes) - min(sizes) <= 1
        # The number of a micro-batch determines its step.
        steps = {place // deal.packs_per_step for batch in batches for place in batch}
        assert steps == {number // deal.accumulation}


@given(st.integers(1, 60), DEALS, st.data())
@settings(max_examples=200, deadline=None)
def test_total_number_of_steps_is_the_same_from_every_position(packs, deal, data):
    deal = replace(deal, drop_last=deal.drop_last and packs >= deal.packs_per_step)
    epochs = data.draw(st.sampled_from([1.0, 2.0, 3.0, 0.5, 2.5]))
    total = Position().num_steps(packs, deal, epochs=epochs)
    position = Position()
    for done in range(total + 1):
        assert position.num_steps(packs, deal, epochs=epochs) == total
        last = position.num_epochs(packs, deal, max_steps=total)
        assert last == (position.epoch + position.is_open if done == total else math.ceil(epochs))
        taken = min(position.packs + deal.packs_per_step, packs)
        if deal.num_steps(packs - taken):
            position = Position(epoch=position.epoch, packs=taken, steps=done + 1, is_open=True)
        elif data.draw(st.booleans()):  # before or after the end of the epoch was recorded
            position = Position(epoch=position.epoch, packs=packs, steps=done + 1, is_open=True)
        else:
            position = Position(epoch=position.epoch + 1, steps=done + 1)
        if not deal.num_steps(packs - position.packs) and done + 1 < total:
            assert position.num_epochs(packs, deal, max_steps=total) == math.ceil(epochs)
            position = Position(epoch=position.epoch + 1, steps=done + 1)


def test_steps_are_recounted_for_another_number_of_ranks():
    position = Position(epoch=1, packs=8, steps=5)
    assert position.num_steps(20, Deal(per_device_batch=4), epochs=3) == 5 + 3 + 5
    assert position.num_steps(20, Deal(per_device_batch=4, ranks=2), epochs=3) == 5 + 2 + 3
    assert position.num_steps(20, Deal(per_device_batch=4), epochs=1.5) == 5 + 1
    assert position.num_epochs(20, Deal(per_device_batch=4, ranks=2), max_steps=8) == 3
    assert position.num_epochs(20, Deal(per_device_batch=4, ranks=2), max_steps=7) == 2


def test_fingerprint_differs_for_every_option_of_the_order():
    def fingerprint(counts=(5, 5), seed=0, content=0, **options):
        return PackOrder([index(counts, content)], seed=seed, **options).fingerprint

    others = [
        fingerprint(), fingerprint((5, 6)), fingerprint(seed=1), fingerprint(content=1), fingerprint(weights=[2.0]),
        fingerprint(shuffle_window=2), fingerprint(packing=True), fingerprint(packing=True, pack_length=300),
        fingerprint(eval_fraction=0.3),
    ]  # fmt: skip
    assert len(set(others)) == len(others)
    assert fingerprint() == fingerprint()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shuffle_window": 0}, r"shuffle_window must be between 1 and 4 \(.*\), got shuffle_window=0"),
        ({"shuffle_window": 5}, r"shuffle_window must be between 1 and 4 \(.*\), got shuffle_window=5"),
        ({"eval_fraction": 1.0}, "eval_fraction must be at least 0 and below 1, got eval_fraction=1.0"),
        ({"eval_fraction": -0.1}, "eval_fraction must be at least 0 and below 1, got eval_fraction=-0.1"),
        ({"weights": [1.0, 2.0]}, r"store_weights must be 1 numbers above 0, .* got store_weights=\[1.0, 2.0\]"),
        ({"weights": [0.0]}, r"store_weights must be 1 numbers above 0, .* got store_weights=\[0.0\]"),
        ({"weights": [math.nan]}, r"store_weights must be 1 numbers above 0, .* got store_weights=\[nan\]"),
        ({"packing": True, "pack_length": 6}, "pack_length must be at least 7, .* got pack_length=6; omit it"),
        ({"eval_fraction": 0.9999999}, "stores must have documents to train on, got 3 documents in store 1 with eval"),
    ],
)
def test_invalid_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PackOrder([index([3], lengths=[5, 7, 2])], **options)


def test_a_million_documents_are_ordered_in_seconds():
    lengths = np.random.default_rng(0).integers(10, 1000, 1_000_000)
    large = DocumentIndex(
        lengths=lengths, digests=np.random.default_rng(1).integers(0, 2**64, 1_000_000, dtype=np.uint64),
        first_document=np.arange(0, 1_000_001, 500),
    )  # fmt: skip
    started = time.process_time()
    order = PackOrder([large], packing=True, pack_length=2048, eval_fraction=0.01)
    assert sum(len(pack.documents) for pack in order.epoch(0)) == 1_000_000 - len(order.held_out())
    assert time.process_time() - started < 25
