"""Packing: documents fill packs with little padding, and packs never exceed their length."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import logitstore
from logitstore.store.documents import DocumentIndex
from trainer import DocumentDataset, DraftModule
from trainer.data.loader import RankBatches, make_loader
from trainer.data.order import PackOrder
from trainer.data.packing import best_fit
from trainer.data.sharding import Deal
from trainer.loss.objectives import make_objective
from trainer.loss.selection import SELECTIONS, Rule

SHARD_ROWS = 2**18
MAX_LENGTH = 2048


def draw(kind, num):
    """Returns lengths in tokens with a distribution that is typical for corpora."""
    rng = np.random.default_rng(5)
    if kind == "uniform":
        lengths = rng.integers(1, MAX_LENGTH + 1, num)
    elif kind == "log-normal":
        lengths = rng.lognormal(5.5, 0.9, num)
    elif kind == "bimodal":
        lengths = np.where(rng.random(num) < 0.9, rng.normal(120, 40, num), rng.normal(1500, 200, num))
    elif kind == "cut windows":  # long texts, split at the maximum
        lengths = np.where(rng.random(num) < 0.5, MAX_LENGTH, rng.integers(1, MAX_LENGTH, num))
    else:  # short questions and answers
        lengths = rng.gamma(3.0, 25.0, num)
    return np.clip(lengths, 4, MAX_LENGTH).astype(np.int64)


def in_shards(lengths, shard_rows):
    """Fills shards one after another, as the dump does."""
    first, room = [0], shard_rows
    for i, length in enumerate(lengths):
        if length > room:
            first.append(i)
            room = shard_rows
        room -= length
    digests = np.random.default_rng(0).integers(0, 2**64, len(lengths), dtype=np.uint64)
    return DocumentIndex(lengths=lengths, digests=digests, first_document=np.array([*first, len(lengths)]))


@pytest.mark.parametrize("kind", ["uniform", "log-normal", "bimodal", "cut windows", "short"])
def test_padding_is_below_5_percent_for_mixed_lengths(kind):
    lengths = draw(kind, 6000)
    order = PackOrder([in_shards(lengths, SHARD_ROWS)], packing=True, pack_length=MAX_LENGTH)
    epoch = order.epoch(0)
    laid_out = tokens = 0
    for places in Deal(per_device_batch=8).batches(len(epoch), 0):
        sizes = [int(lengths[list(epoch[place].documents)].sum()) for place in places]
        laid_out += len(sizes) * max(sizes)  # a batch is as wide as its longest pack
        tokens += sum(sizes)
    assert tokens == lengths.sum()
    assert 1 - tokens / laid_out <= order.waste < 0.05
    apart = PackOrder([in_shards(lengths, SHARD_ROWS)])
    assert apart.waste == 0.0
    assert not apart.packing


def test_longer_packs_reduce_padding_when_two_long_documents_do_not_fit():
    rng = np.random.default_rng(3)
    lengths = np.where(rng.random(4000) < 0.7, rng.integers(60, 180, 4000), rng.integers(1300, 1700, 4000))
    index = in_shards(lengths, SHARD_ROWS)
    short, long = (PackOrder([index], packing=True, pack_length=n).waste for n in (MAX_LENGTH, 4 * MAX_LENGTH))
    assert short > 0.1
    assert long < 0.05


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(40, 90))
@settings(max_examples=150, deadline=None)
def test_packs_never_exceed_their_length_and_lose_no_document(lengths, pack_length):
    lengths = np.array(lengths, dtype=np.int64)
    packs = best_fit(lengths, pack_length)
    filled = np.bincount(packs, weights=lengths)
    assert len(packs) == len(lengths)
    assert (filled <= pack_length).all()
    assert (filled > 0).all()
    # Best fit never leaves two packs that are at most half full.
    assert (filled * 2 <= pack_length).sum() <= 1


def test_next_document_goes_into_the_fullest_pack_with_room():
    lengths = np.array([3, 6, 7, 2, 1, 1])
    packs = best_fit(lengths, 10)
    # In order of length: 7 and 6 open two packs, 3 joins the 7, and 2, 1, 1 join the 6.
    assert packs.tolist() == [0, 1, 0, 1, 1, 1]


def test_default_pack_length_is_the_longest_document():
    index = in_shards(np.array([5, 9, 2, 2, 3]), 64)
    assert PackOrder([index], packing=True).pack_length == 9
    assert PackOrder([index], packing=True, pack_length=30).pack_length == 30
    assert len(PackOrder([index], packing=True, pack_length=30).epoch(0)) == 1


def test_packed_documents_have_the_same_loss_and_gradient_as_alone(tiny, tiny_store):
    draft = AutoModelForCausalLM.from_pretrained(tiny.draft).double()
    rule = Rule(selection=SELECTIONS["all"], scope="micro_batch", keep=1.0, outside_weight=0.0)
    module = DraftModule(draft, vocab_size=512, objective=make_objective("forward_kl"), rule=rule)
    found = []
    for packing, batch_size in ((False, 1), (True, 3)):
        data = DocumentDataset([logitstore.open(tiny_store)], packing=packing, pack_length=400)
        module.zero_grad()
        loss, sizes = 0.0, []
        for batch in make_loader(data, RankBatches(data.order, Deal(per_device_batch=batch_size))):
            one = module(**batch)["loss"]
            one.backward()
            loss += float(one.detach())
            sizes.append(len(batch["documents"].unique()))
        found.append((loss, [parameter.grad.clone() for parameter in module.parameters()]))
    assert max(sizes) > 3
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    for packed, alone in zip(found[1][1], found[0][1], strict=True):
        torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4 * float(alone.abs().max()))
