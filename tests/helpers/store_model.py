"""A plain Python model of a store's contents, and tiny random values for it. No neural network, tokenizer or file."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from logitstore.errors import DamagedShardError, IdentityError, LayerNotFoundError
from logitstore.format import layout
from logitstore.format.commit import layer_digest, make_commit
from logitstore.format.schemes import Scheme
from logitstore.format.spec import DataSpec, LossSpec, ModelSpec, StoreSpec, TargetSpec, TokenizerSpec
from logitstore.rows import codec
from logitstore.rows.tokens import encode_tokens
from logitstore.store import writer
from logitstore.store.commits import appends
from tests.helpers.stores import likeliest, target_values

VOCAB, K, SHARD_ROWS, MAX_LENGTH = 8, 2, 16, 5
LAYERS = ("tokens", "target", "losses/a", "losses/b")
MODEL = ModelSpec(name="none", revision="0", dtype="float32", padded_vocab_size=VOCAB)


def data_spec(version):
    name = f"sha256:{version:064d}"
    return DataSpec(source=str(version), digest=name, columns="input_ids", mask_policy="given", documents=name)


def spec_of(num_shards):
    return StoreSpec(
        tokenizer=TokenizerSpec(name="none", fingerprint=f"sha256:{'0' * 64}", vocab_size=VOCAB, chat_template=None),
        data=data_spec(0), max_length=MAX_LENGTH, shard_rows=SHARD_ROWS, num_shards=num_shards,
        target=TargetSpec(model=MODEL, scheme=Scheme(k=K)), losses={name: LossSpec(model=MODEL) for name in ("a", "b")},
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class Attempt:
    """The values that one writer has computed for one shard of a layer."""

    key: tuple
    """Name of the layer and number of the shard."""
    arrays: dict
    lengths: np.ndarray
    mask: np.ndarray
    """Rows that have values."""
    computed_from: str | None
    set_aside: dict

    @property
    def digest(self):
        return layer_digest(self.key[0], self.arrays)

    @property
    def sizes(self):
        return {
            "documents": len(self.lengths), "rows": len(self.mask), "counted": int(self.mask.sum()),
            "computed_from": self.computed_from, "set_aside": self.set_aside,
        }  # fmt: skip

    @property
    def name(self):
        """File name of its commit record."""
        return make_commit(*self.key, self.arrays, made_by="", seconds=0.0, **self.sizes).name

    def write(self, storage, spec):
        """Writes the values as the dump does; returns the record that is committed afterwards."""
        into = writer.LayerWriter(storage, spec, self.key[0])
        return into.write(self.key[1], self.arrays, started=time.monotonic(), **self.sizes)


def tokens_attempt(shard, seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, MAX_LENGTH + 1, rng.integers(1, 4)).astype(np.uint32)
    mask = rng.random(lengths.sum()) < rng.choice([0.0, 0.6, 1.0])  # with 0.0 no row counts: most arrays have no object
    mask[np.cumsum(lengths) - 1] = False
    ids = rng.integers(0, VOCAB, len(mask), np.uint32)
    arrays = encode_tokens(ids, mask, lengths)
    return Attempt(key=("tokens", shard), arrays=arrays, lengths=lengths, mask=mask, computed_from=None, set_aside={})


def computed_attempt(layer, below, seed, set_aside):
    """Returns values of `target` or losses for the commit of the layer below, with some documents set aside."""
    rng = np.random.default_rng(seed)
    kept = np.ones(len(below.lengths), dtype=bool)
    kept[list(set_aside)] = False
    mask = below.mask & np.repeat(kept, below.lengths)
    if layer == "target":
        arrays = target_arrays(rng, below.arrays["ids"], mask)
    else:
        ce, label = (np.where(mask, rng.exponential(2.0, len(mask)), np.nan).astype(np.float32) for _ in range(2))
        arrays = {"ce": codec.round_mantissa(ce), "label_logprob": codec.round_mantissa(-label)}
    return Attempt(
        key=(layer, below.key[1]), arrays=arrays, lengths=below.lengths, mask=mask, computed_from=below.digest,
        set_aside=set_aside,
    )  # fmt: skip


def target_arrays(rng, ids, mask):
    p = np.where(mask[:, None], rng.dirichlet(np.ones(VOCAB), len(mask)), np.nan)
    return target_values(p, ids, likeliest(p, mask, K), spec_of(1).target)


def add_documents(storage, spec, number, new, attempts):
    """Appends documents as the dump does. Returns False, and adds nothing, if another append is under way."""
    if appends.claim(storage, number, new) != new:
        return False
    for attempt in attempts:
        attempt.write(storage, spec)
    writer.make_room(storage, spec_of(new.first_shard + new.num_shards), "tokens")
    appends.write_append(storage, number, new)
    appends.drop_claim(storage, number)
    return True


def equal(found, expected):
    return found.keys() == expected.keys() and all(
        np.array_equal(found[name], expected[name], equal_nan=found[name].dtype.kind == "f") for name in expected
    )


class StoreModel:
    """The expected contents of a store, as dictionaries.

    Attributes:
        committed: The committed attempt of each layer and shard.
        damaged: Which of those are damaged, and where: "record" or "objects".
        parts: (version of the documents, number of shards) of the first data, then of each append.
        pending: The part that is being appended.
    """

    def __init__(self, seed, num_shards):
        self.seed = seed
        self.committed, self.damaged = {}, {}
        self.parts = [(0, num_shards)]
        self.pending = None

    @property
    def num_shards(self):
        return sum(num for _, num in self.parts)

    @property
    def extent(self):
        """Number of shards that readers see."""
        return next((s for s in range(self.num_shards) if ("tokens", s) not in self.committed), self.num_shards)

    def documents(self, shard):
        """Returns the tokens of a shard. Every writer computes the same ones."""
        first = 0
        for version, num in [*self.parts, self.pending]:
            if shard < first + num:
                return tokens_attempt(shard, [self.seed, version, shard])
            first += num
        raise AssertionError

    def is_stale(self, key):
        below = self.committed.get((layout.below(key[0]), key[1]))
        return below is not None and self.committed[key].computed_from != below.digest

    def chain(self, key):
        """Returns a shard of a layer after the shards of the layers that it was computed from."""
        names = {"tokens": ("tokens",), "target": ("tokens", "target")}.get(key[0], ("tokens", "target", key[0]))
        return [(name, key[1]) for name in names]

    def errors(self, key):
        """Returns the exception classes of which reading a shard must raise one; empty if reading must succeed."""
        found = set()
        for link in self.chain(key):
            if link not in self.committed:
                found.add(LayerNotFoundError)
            # To read losses, the reader needs the commit record of the target, and not the target's values.
            elif link in self.damaged and (link[0] != "target" or link == key or self.damaged[link] == "record"):
                found.add(DamagedShardError)
        if key in self.committed and self.is_stale(key):
            found.add(IdentityError)
        return tuple(found)

    @property
    def problems(self):
        """The shards that verify must report, as (layer, shard)."""
        stale = [
            key for key in self.committed
            if self.is_stale(key) and self.damaged.get((layout.below(key[0]), key[1])) != "record"
        ]  # fmt: skip
        return {key for key in (*self.damaged, *stale) if key[1] < self.num_shards}
