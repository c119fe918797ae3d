"""The values that the writers of a torture run write. They follow from the shard's number, so every row is recognised.

The token id of a row is the row's number, so a row that is lost, doubled or in the wrong place is detected. A shard of
`target` has several variants, as if it were computed on different devices. `losses/reference` follows from the rows of
the target. R rows, D documents, E entries.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from logitstore.format.schemes import Scheme
from logitstore.format.spec import DataSpec, LossSpec, ModelSpec, StoreSpec, TargetSpec, TokenizerSpec
from logitstore.rows.tokens import encode_tokens

LOSSES = "losses/reference"
LAYERS = ("tokens", "target", LOSSES)
VARIANTS = 3
K = 4
SHARD_ROWS = 256
MAX_LENGTH = 48
VOCAB_SIZE = 2**16
NUM_SHARDS = 8
APPENDED = 3

MODEL = ModelSpec(name="torture", revision="0", dtype="float32", padded_vocab_size=VOCAB_SIZE)
TARGET = TargetSpec(model=MODEL, scheme=Scheme(k=K))
REFERENCE = LossSpec(model=MODEL)
DATA = DataSpec(source="torture", digest=None, columns="input_ids", mask_policy="given")
SPEC = StoreSpec(
    tokenizer=TokenizerSpec(name="torture", fingerprint="none", vocab_size=VOCAB_SIZE, chat_template=None),
    data=DATA, max_length=MAX_LENGTH, shard_rows=SHARD_ROWS, num_shards=NUM_SHARDS,
)  # fmt: skip
MORE = dataclasses.replace(SPEC, data=dataclasses.replace(DATA, source="more"))
"""Spec of a store with only the appended documents."""


def tokens(shard):
    """Returns the arrays of `tokens` of a shard. In every fifth shard no row counts, so some arrays have no object."""
    rng = np.random.default_rng([1, shard])
    lengths = []
    while (room := SHARD_ROWS - sum(lengths)) >= 2:
        lengths.append(min(room, int(rng.integers(2, MAX_LENGTH + 1))))
    rows = sum(lengths)
    mask = np.zeros(rows, np.uint8) if shard % 5 == 4 else (rng.random(rows) < 0.6).astype(np.uint8)
    mask[np.cumsum(lengths) - 1] = 0
    ids = np.arange(shard * SHARD_ROWS, shard * SHARD_ROWS + rows, dtype=np.uint32)
    return encode_tokens(ids, mask, np.array(lengths))


class Appended:
    """The appended documents, in the form that the dump uses."""

    num_shards = APPENDED

    @staticmethod
    def shard(number):
        return tokens(NUM_SHARDS + number)


def target(shard, variant):
    """Returns the arrays of `target` of a shard as one variant of the model computes them."""
    mask = tokens(shard)["loss_mask"].astype(bool)
    rng = np.random.default_rng([2, shard, variant])
    counts = np.where(mask, rng.integers(1, K + 1, len(mask)), 0).astype(np.uint16)
    entries = int(counts.sum())
    # An array of fill values has no object. In some variants `gaps` is one, and must replace another variant's object.
    gaps = np.zeros(entries) if (shard + variant) % 3 == 0 else rng.integers(0, VOCAB_SIZE // K - 1, entries)
    return {
        "counts": counts,
        "gaps": gaps.astype(np.uint32),
        "logprobs": rng.integers(0, 256, entries).astype(np.uint8),
        "draws": np.zeros(entries, np.uint16),
        "tail": masked(-0.1 - 8 * rng.random(len(mask)), mask),
        "label_logprob": masked(-9 * rng.random(len(mask)), mask),
        "entropy": masked(5 * rng.random(len(mask)), mask),
    }


def losses(rows):
    """Returns the arrays of `losses/reference` of a shard, computed from its arrays of `target`."""
    mask = rows["counts"] > 0
    row = np.repeat(np.arange(len(mask)), rows["counts"])
    codes = np.bincount(row, weights=rows["logprobs"] + rows["gaps"] / VOCAB_SIZE, minlength=len(mask))
    return {
        "ce": masked(codes / 256 - rows["tail"], mask),
        "label_logprob": masked(rows["label_logprob"] - rows["entropy"], mask),
    }


def masked(values, mask):
    return np.where(mask, values, np.nan).astype(np.float32)


def same(arrays, others):
    """Returns whether the arrays of two shards are equal byte for byte."""
    return all(arrays[name].tobytes() == others[name].tobytes() for name in others)
