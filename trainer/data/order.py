"""Order of packs: which documents fill a pack, and in which order an epoch reads the packs. Depends on NumPy only.

A pack fills one sequence of a batch: it is one document, or several documents of one shard, joined end to end. The
order of an epoch depends on the documents, the options, the seed and the number of the epoch, but never on ranks or
workers.

This module does not read stores. In shapes, D is the number of documents, S the number of shards, and P the number of
packs.
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
"""Maximum number of shards whose packs are shuffled together (a window). The decoded shards of two windows stay in
memory."""

# Purposes for which random numbers are drawn. The purpose is the second number of each seed, so that two purposes never
# get the same random numbers.
EPOCH, PASS, CUT, ROWS = 1, 2, 3, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Pack:
    """Documents of one shard that fill one sequence of a batch, with everything that is needed to read them."""

    store: int
    """Number of the store that holds the documents, from 0."""
    shard: int
    """Number of the documents' shard within the store."""
    documents: tuple[int, ...]
    """Numbers of the documents within the store, in ascending order."""
    seed: int = 0
    """Seed of the order of packs."""
    epoch: int = 0
    """Number of the epoch that reads the pack."""
    soon: tuple[tuple[int, int], ...] = ()
    """(store, shard) pairs of all shards in the pack's window and in the next window. A reader should load these shards
    in this order, before they are requested."""


class PackOrder:
    """Packs of one or more stores, and the order in which an epoch reads them.

    The weight of a store is the number of times that an epoch reads its packs. The P packs of a store are read in an
    endless sequence of passes. Each pass reads every pack once, in a new order. An epoch takes the next
    max(1, round(weight * P)) packs of this sequence. All epochs therefore have the same length. At weight 0.5, for
    example, epoch 0 reads one half of the packs, and epoch 1 the other half.

    Attributes:
        packs_per_epoch: Number of packs in an epoch, of all stores together.
        packing: Whether packs may hold several documents.
        pack_length: Maximum number of tokens in a pack.
        waste: Fraction of the packs' space (pack_length tokens in each pack) that no document fills; 0 without packing.
        fingerprint: SHA-256, in hexadecimal, of everything that determines the order of all epochs.
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
            stores: Lengths and digests of each store's documents.
            weights: For each store, the number of times that an epoch reads its packs: a number above 0. None stands
                for 1 each.
            packing: Whether a pack holds as many documents as fit. If false, each pack holds one document.
            pack_length: Maximum number of tokens in a pack, used only with packing. None stands for the length of the
                longest document.
            eval_fraction: Fraction of the documents to hold out, at least 0 and below 1. Each document's digest decides
                whether it is held out.
            shuffle_window: Number of shards whose packs are shuffled together, 1 to `MAX_WINDOW`.
            seed: Seed of the order.

        Raises:
            ValueError: A value is out of its range, or all documents of a store are held out.
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
                    f"eval_fraction={eval_fraction}; omit the store, or give a smaller eval_fraction"
                )
        # Packs are numbered across all stores. This array holds the number of each store's first pack.
        self._first = np.cumsum([0, *map(len, self._packings)])
        # At least one pack is taken, so that a store with a tiny weight is not left out.
        self._taken = [
            max(1, round(weight * len(packs))) for weight, packs in zip(weights, self._packings, strict=True)
        ]
        self.packs_per_epoch = sum(self._taken)
        tokens = sum(int(i.lengths[p.documents].sum()) for i, p in zip(stores, self._packings, strict=True))
        self.waste = 1.0 - tokens / (int(self._first[-1]) * self.pack_length) if packing else 0.0
        self.fingerprint = self._fingerprint()

    def _fingerprint(self) -> str:
        """Computes the attribute `fingerprint`. A resumed run compares it with the fingerprint in its checkpoint."""
        sha = hashlib.sha256(f"{self._seed} {self._window} {self._taken}".encode())
        for index, packs in zip(self._stores, self._packings, strict=True):
            for values in (index.digests[packs.documents], packs.documents, packs.starts, packs.first_pack):
                sha.update(np.ascontiguousarray(values).tobytes())
        return sha.hexdigest()

    @property
    def num_documents(self) -> int:
        """Number of documents that are trained on, in all stores together."""
        return sum(len(packs.documents) for packs in self._packings)

    @property
    def num_held_out(self) -> int:
        """Number of documents that are held out, in all stores together."""
        return sum(map(len, self._stores)) - self.num_documents

    def tokens(self, pack: Pack) -> int:
        """Returns the number of tokens in a pack, without padding."""
        return int(self._stores[pack.store].lengths[list(pack.documents)].sum())

    def held_out(self, at_most: int | None = None) -> list[tuple[int, int]]:
        """Returns the held-out documents as (store, document) pairs, ordered by store and document.

        Args:
            at_most: Maximum number of documents to return; None returns all. The documents with the lowest digests are
                chosen, which spreads them evenly over all stores and shards.
        """
        places = [np.flatnonzero(held_out(index.digests, self._eval_fraction)) for index in self._stores]
        digests = np.concatenate([i.digests[found] for i, found in zip(self._stores, places, strict=True)])
        stores = np.repeat(np.arange(len(places)), [len(found) for found in places])
        documents = np.concatenate(places)
        # The chosen documents are sorted by store and number again, so that each shard's documents stay together.
        chosen = np.sort(np.argsort(digests, kind="stable")[:at_most])
        return list(zip(stores[chosen].tolist(), documents[chosen].tolist(), strict=True))

    def epoch(self, epoch: int) -> Epoch:
        """Returns the order of an epoch.

        Args:
            epoch: Number of the epoch, from 0.
        """
        pieces = [piece for store in range(len(self._stores)) for piece in self._pieces(store, epoch)]
        rng = np.random.default_rng([self._seed, EPOCH, epoch])
        # Shards are shuffled first, then the packs within each window of shards, so that a reader needs few shards at
        # once.
        shuffled = rng.permutation(len(pieces))
        packs, windows, bounds = [], [], [0]
        for start in range(0, len(pieces), self._window):
            some = [pieces[i] for i in shuffled[start : start + self._window]]
            packs.append(rng.permutation(np.concatenate([numbers for _, _, numbers in some])))
            # If a store is read more than once in an epoch, a window may hold the same shard twice.
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
        """Yields the packs that an epoch takes from a store, shard by shard.

        Yields:
            Tuples of the store's number, the shard's number, and an int64 array of pack numbers. The caller shuffles
            the packs.
        """
        packs, num_packs = self._packings[store], len(self._packings[store])
        begin, end = epoch * self._taken[store], (epoch + 1) * self._taken[store]
        # In the endless sequence of passes, the epoch takes positions `begin` to `end` - 1. `number` counts the passes.
        for number in range(begin // num_packs, -(-end // num_packs)):
            shards = np.random.default_rng([self._seed, PASS, store, number]).permutation(len(packs.first_pack) - 1)
            place = number * num_packs
            for shard in shards.tolist():
                numbers = np.arange(packs.first_pack[shard], packs.first_pack[shard + 1])
                some = slice(max(0, begin - place), max(0, end - place))
                place += len(numbers)
                if some.start or some.stop < len(numbers):
                    # The epoch begins or ends within this shard. The permutation depends on the pass and not on the
                    # epoch, so the neighbouring epochs take exactly the packs that this epoch leaves out.
                    cut = np.random.default_rng([self._seed, CUT, store, number, shard])
                    numbers = cut.permutation(numbers)[some]
                if len(numbers):
                    yield store, shard, self._first[store] + numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch:
    """Order of the packs in one epoch."""

    number: int
    """Number of the epoch, from 0."""
    seed: int
    """Seed of the order."""
    packs: NDArray[np.int64]
    """[packs_per_epoch]: numbers of the packs, in the order of the epoch. Packs are numbered across all stores."""
    windows: tuple[tuple[tuple[int, int], ...], ...]
    """(store, shard) pairs of each window. The packs of a window are shuffled together."""
    bounds: tuple[int, ...]
    """[number of windows + 1]: window w holds packs[bounds[w] : bounds[w + 1]]."""
    first: NDArray[np.int64]
    """[number of stores + 1]: for each store, the number of its first pack. The last value is the number of packs in
    all stores together."""
    packings: tuple[Packing, ...]
    """Packing of each store."""

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, place: int) -> Pack:
        """Returns the pack at a position of the order, from 0 to packs_per_epoch - 1."""
        # Here, `number` counts the packs of all stores. Below, it counts only the packs of the pack's own store.
        number = int(self.packs[place])
        store = int(np.searchsorted(self.first, number, side="right")) - 1
        packing, number = self.packings[store], number - int(self.first[store])
        window = bisect_left(self.bounds, place + 1) - 1
        # The reader needs the shards of this window now, and those of the next window soon.
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
    """Raises ValueError unless a shuffle window has between 1 and `MAX_WINDOW` shards."""
    if not 1 <= window <= MAX_WINDOW:
        raise ValueError(
            f"shuffle_window must be between 1 and {MAX_WINDOW} (the shards of two windows stay in memory), "
            f"got shuffle_window={window}; for a wider shuffle, dump with a larger --shard_rows"
        )


def check_eval_fraction(fraction: float) -> None:
    """Raises ValueError unless the fraction of held-out documents is at least 0 and below 1."""
    if not 0.0 <= fraction < 1.0:
        raise ValueError(
            f"eval_fraction must be at least 0 and below 1, got eval_fraction={fraction}; 0.01 holds out every "
            "hundredth document"
        )


def check_weights(weights: Sequence[float] | None, num_stores: int) -> Sequence[float]:
    """Checks the weights of stores, and returns them.

    Args:
        weights: Weight of each store; None stands for 1 each.
        num_stores: Number of stores.

    Raises:
        ValueError: The number of weights is not `num_stores`, or a weight is not a finite number above 0.
    """
    if weights is None:
        return [1.0] * num_stores
    if len(weights) != num_stores or not all(math.isfinite(weight) and weight > 0.0 for weight in weights):
        raise ValueError(
            f"store_weights must be {num_stores} numbers above 0, one for each store, got "
            f"store_weights={list(weights)}; 1 reads each document of a store once per epoch"
        )
    return weights


def check_pack_length(pack_length: int | None, longest: int) -> int:
    """Returns the maximum number of tokens in a pack, after a check that every document fits.

    Args:
        pack_length: Requested number of tokens; None stands for `longest`.
        longest: Number of tokens in the longest document.

    Raises:
        ValueError: The longest document does not fit into a pack.
    """
    if pack_length is not None and pack_length < longest:
        raise ValueError(
            f"pack_length must be at least {longest}, the length of the longest document, got "
            f"pack_length={pack_length}; omit it for a length that fits every document"
        )
    return longest if pack_length is None else pack_length
