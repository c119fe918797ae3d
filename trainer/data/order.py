"""The order of documents: how they fill packs, and the order of an epoch. NumPy only.

A pack is what one row of a batch holds: one document, or several of one shard end to end. The order of the packs of an
epoch follows from the documents' lengths, the seed and the number of the epoch alone, never from ranks or workers.

Nothing here reads a store. D documents, S shards, P packs.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from trainer.data.packing import Packing, held_out, make_packing

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from logitstore.store.documents import DocumentIndex

MAX_WINDOW = 4
"""Shards among which packs are shuffled, at most: twice as many stay decoded in memory."""

# What random numbers are for: the second word of a seed, so that none are drawn twice.
EPOCH, PASS, CUT, ROWS = 1, 2, 3, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Pack:
    """Documents of one shard that fill one row of a batch, and what their reader has to know besides."""

    store: int
    """Place of their store among the stores."""
    shard: int
    documents: tuple[int, ...]
    """Their numbers in the store, rising."""
    seed: int = 0
    """Of the run."""
    epoch: int = 0
    """In which they are read."""
    soon: tuple[tuple[int, int], ...] = ()
    """Stores and shards of this window of the order and of the next one, as they come: worth having in memory."""


class PackOrder:
    """The packs of some stores, and in which order an epoch reads them.

    The weight of a store is how many times its packs come in an epoch. Its packs are read in endless passes, each in
    an order of its own, of which every epoch takes the next round(weight * P): so all epochs are of one length, and at
    weight 0.5 two of them hold each pack once.

    Attributes:
        packs_per_epoch: Of all stores.
        packing: Whether packs hold several documents.
        pack_length: Most tokens of a pack.
        waste: Share of P * pack_length that no document fills; 0 without packing.
        fingerprint: Of everything that the order of all epochs follows from.
    """

    def __init__(
        self,
        stores: Sequence[DocumentIndex],
        *,
        weights: Sequence[float] | None = None,
        packing: bool = False,
        pack_length: int | None = None,
        eval_fraction: float = 0.0,
        shuffle_window: int = MAX_WINDOW,
        seed: int = 0,
    ) -> None:
        """Fills the packs.

        Args:
            stores: The documents of each.
            weights: As many; 1 by default.
            packing: Whether packs hold as many documents as fit.
            pack_length: Most tokens of a pack then; the longest document's by default.
            eval_fraction: Share of the documents, by digest, that is held out from training.
            shuffle_window: Shards among which packs are shuffled.
            seed: Of the order.

        Raises:
            ValueError: One of them is out of its range, or no document is left to train on.
        """
        check_window(shuffle_window)
        check_eval_fraction(eval_fraction)
        weights = check_weights(weights, len(stores))
        longest = max(int(index.lengths.max(initial=1)) for index in stores)
        self.packing = packing
        self.pack_length = check_pack_length(pack_length, longest) if packing else longest
        self._stores = tuple(stores)
        self._eval_fraction = eval_fraction
        self._window = shuffle_window
        self._seed = seed
        self._packings = tuple(
            make_packing(index, pack_length=self.pack_length if packing else None, eval_fraction=eval_fraction)
            for index in stores
        )
        for i, packs in enumerate(self._packings):
            if not len(packs):
                raise ValueError(
                    f"stores must have documents to train on, got {len(stores[i])} documents in store {i + 1} with "
                    f"eval_fraction={eval_fraction}; leave the store out, or give a smaller eval_fraction"
                )
        # Packs of all stores are numbered through.
        self._first = np.cumsum([0, *map(len, self._packings)])
        self._taken = [
            max(1, round(weight * len(packs))) for weight, packs in zip(weights, self._packings, strict=True)
        ]
        self.packs_per_epoch = sum(self._taken)
        tokens = sum(int(i.lengths[p.documents].sum()) for i, p in zip(stores, self._packings, strict=True))
        self.waste = 1.0 - tokens / (int(self._first[-1]) * self.pack_length) if packing else 0.0
        self.fingerprint = self._fingerprint()

    def _fingerprint(self) -> str:
        sha = hashlib.sha256(f"{self._seed} {self._window} {self._taken}".encode())
        for index, packs in zip(self._stores, self._packings, strict=True):
            for values in (index.digests[packs.documents], packs.documents, packs.starts, packs.first_pack):
                sha.update(np.ascontiguousarray(values).tobytes())
        return sha.hexdigest()

    @property
    def num_documents(self) -> int:
        """Documents that are trained on, of all stores."""
        return sum(len(packs.documents) for packs in self._packings)

    @property
    def num_held_out(self) -> int:
        """Documents that are not."""
        return sum(map(len, self._stores)) - self.num_documents

    def tokens(self, pack: Pack) -> int:
        """Returns how many tokens a pack holds."""
        return int(self._stores[pack.store].lengths[list(pack.documents)].sum())

    def held_out(self, at_most: int | None = None) -> list[tuple[int, int]]:
        """Returns the documents that no pack holds, as (store, document) in the order of the stores.

        Args:
            at_most: Those with the lowest digests alone, so many: of all stores and shards alike.
        """
        places = [np.flatnonzero(held_out(index.digests, self._eval_fraction)) for index in self._stores]
        digests = np.concatenate([i.digests[found] for i, found in zip(self._stores, places, strict=True)])
        stores = np.repeat(np.arange(len(places)), [len(found) for found in places])
        documents = np.concatenate(places)
        chosen = np.sort(np.argsort(digests, kind="stable")[:at_most])
        return list(zip(stores[chosen].tolist(), documents[chosen].tolist(), strict=True))

    def epoch(self, epoch: int) -> Epoch:
        """Returns the order of an epoch, from 0."""
        pieces = [piece for store in range(len(self._stores)) for piece in self._pieces(store, epoch)]
        rng = np.random.default_rng([self._seed, EPOCH, epoch])
        shuffled = rng.permutation(len(pieces))
        packs, windows, bounds = [], [], [0]
        for start in range(0, len(pieces), self._window):
            some = [pieces[i] for i in shuffled[start : start + self._window]]
            packs.append(rng.permutation(np.concatenate([numbers for _, _, numbers in some])))
            windows.append(tuple(dict.fromkeys((store, shard) for store, shard, _ in some)))
            bounds.append(bounds[-1] + len(packs[-1]))
        return Epoch(
            number=epoch,
            seed=self._seed,
            packs=np.concatenate(packs),
            windows=tuple(windows),
            bounds=tuple(bounds),
            first=self._first,
            packings=self._packings,
        )

    def _pieces(self, store: int, epoch: int) -> Iterator[tuple[int, int, NDArray[np.int64]]]:
        """Yields what an epoch takes of a store: the store, the shard, and some of its packs, in any order."""
        packs, num_packs = self._packings[store], len(self._packings[store])
        begin, end = epoch * self._taken[store], (epoch + 1) * self._taken[store]
        for number in range(begin // num_packs, -(-end // num_packs)):
            shards = np.random.default_rng([self._seed, PASS, store, number]).permutation(len(packs.first_pack) - 1)
            place = number * num_packs
            for shard in shards.tolist():
                numbers = np.arange(packs.first_pack[shard], packs.first_pack[shard + 1])
                some = slice(max(0, begin - place), max(0, end - place))
                place += len(numbers)
                if some.start or some.stop < len(numbers):
                    # Cut by the epoch: what is left of it comes in another one.
                    cut = np.random.default_rng([self._seed, CUT, store, number, shard])
                    numbers = cut.permutation(numbers)[some]
                if len(numbers):
                    yield store, shard, self._first[store] + numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch:
    """The order of one epoch."""

    number: int
    seed: int
    packs: NDArray[np.int64]
    """[packs_per_epoch]: numbers of packs, those of all stores numbered through."""
    windows: tuple[tuple[tuple[int, int], ...], ...]
    """Stores and shards of each window."""
    bounds: tuple[int, ...]
    """Window w holds packs bounds[w]..bounds[w + 1] of the order."""
    first: NDArray[np.int64]
    """Number of the first pack of each store, and how many there are."""
    packings: tuple[Packing, ...]
    """Of each store."""

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, place: int) -> Pack:
        """Returns the pack at a place of the order."""
        number = int(self.packs[place])
        store = int(np.searchsorted(self.first, number, side="right")) - 1
        packing, number = self.packings[store], number - int(self.first[store])
        window = bisect_left(self.bounds, place + 1) - 1
        soon = [shard for part in self.windows[window : window + 2] for shard in part]
        return Pack(
            store=store,
            shard=int(np.searchsorted(packing.first_pack, number, side="right")) - 1,
            documents=tuple(packing.documents[packing.starts[number] : packing.starts[number + 1]].tolist()),
            seed=self.seed,
            epoch=self.number,
            soon=tuple(dict.fromkeys(soon)),
        )


def check_window(window: int) -> None:
    """Raises ValueError unless the shards of two windows may stay in memory, at least one each."""
    if not 1 <= window <= MAX_WINDOW:
        raise ValueError(
            f"shuffle_window must be between 1 and {MAX_WINDOW}, as twice the shards stay decoded in memory, "
            f"got shuffle_window={window}; for a wider shuffle dump with a larger --shard_rows"
        )


def check_eval_fraction(fraction: float) -> None:
    """Raises ValueError unless some documents may be left to train on."""
    if not 0.0 <= fraction < 1.0:
        raise ValueError(
            f"eval_fraction must be at least 0 and below 1, got eval_fraction={fraction}; 0.01 holds out every "
            "hundredth document"
        )


def check_weights(weights: Sequence[float] | None, num_stores: int) -> Sequence[float]:
    """Returns the weights of stores, 1 where none are given.

    Raises:
        ValueError: They are not one for each store, or not all above 0.
    """
    if weights is None:
        return [1.0] * num_stores
    if len(weights) != num_stores or not all(math.isfinite(weight) and weight > 0.0 for weight in weights):
        raise ValueError(
            f"store_weights must be {num_stores} numbers above 0, one for each store, got "
            f"store_weights={list(weights)}; 1 reads each document of a store once an epoch"
        )
    return weights


def check_pack_length(pack_length: int | None, longest: int) -> int:
    """Returns the most tokens of a pack: that of the longest document where none is given.

    Raises:
        ValueError: A document would not fit.
    """
    if pack_length is not None and pack_length < longest:
        raise ValueError(
            f"pack_length must be at least {longest}, the longest document's tokens, got pack_length={pack_length}; "
            "leave it out for that"
        )
    return longest if pack_length is None else pack_length
