"""Packs documents into sequences, and holds documents out."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from logitstore.store.documents import DocumentIndex


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How the documents of a store fill packs, the same in every epoch."""

    documents: NDArray[np.int64]
    """[D]: numbers of the documents that are trained on, pack by pack."""
    starts: NDArray[np.int64]
    """[P + 1]: pack i holds documents starts[i]..starts[i + 1] of these."""
    first_pack: NDArray[np.int64]
    """[S + 1]: shard s fills packs first_pack[s]..first_pack[s + 1]."""

    def __len__(self) -> int:
        return len(self.starts) - 1


def held_out(digests: NDArray[np.uint64], fraction: float) -> NDArray[np.bool_]:
    """Tells which documents are held out: those whose digest is below a fraction of 2**64.

    The same content is held out of every store, and stays so when a store grows.
    """
    return digests < np.uint64(int(fraction * 2**64))


def best_fit(lengths: NDArray[np.int64], pack_length: int) -> NDArray[np.int64]:
    """Assigns documents to packs, the longest first, each to the fullest pack that has room for it.

    Args:
        lengths: [D], each from 1 to `pack_length`.
        pack_length: Most tokens of a pack.

    Returns:
        [D]: the pack of each document; packs are numbered from 0 without gaps.
    """
    by_length = np.argsort(-lengths, kind="stable")
    shortest = int(lengths.min(initial=1))
    rooms: list[int] = []  # rising, each with packs that have just this room left
    packs_of: dict[int, list[int]] = {}
    found = np.empty(len(lengths), dtype=np.int64)
    num_packs = 0
    for document, length in zip(by_length.tolist(), lengths[by_length].tolist(), strict=True):
        place = bisect_left(rooms, length)
        if place == len(rooms):
            pack, room = num_packs, pack_length
            num_packs += 1
        else:
            room = rooms[place]
            pack = packs_of[room].pop()
            if not packs_of[room]:
                del packs_of[room], rooms[place]
        found[document] = pack
        room -= length
        if room >= shortest:  # no other document goes elsewhere
            if room not in packs_of:
                rooms.insert(bisect_left(rooms, room), room)
                packs_of[room] = []
            packs_of[room].append(pack)
    return found


def make_packing(index: DocumentIndex, *, pack_length: int | None, eval_fraction: float) -> Packing:
    """Fills packs with the documents of a store that are trained on.

    Args:
        index: Of the store.
        pack_length: Most tokens of a pack; None gives each document one of its own.
        eval_fraction: Documents below it are in no pack.
    """
    trained = ~held_out(index.digests, eval_fraction)
    documents, counts, first_pack = [np.empty(0, np.int64)], [np.empty(0, np.int64)], [0]
    for start, stop in zip(index.first_document[:-1].tolist(), index.first_document[1:].tolist(), strict=True):
        numbers = start + np.flatnonzero(trained[start:stop])
        if pack_length is None:
            counts.append(np.ones(len(numbers), dtype=np.int64))
        else:
            pack_of = best_fit(index.lengths[numbers], pack_length)
            counts.append(np.bincount(pack_of))
            numbers = numbers[np.argsort(pack_of, kind="stable")]
        documents.append(numbers)
        first_pack.append(first_pack[-1] + len(counts[-1]))
    starts = np.zeros(first_pack[-1] + 1, dtype=np.int64)
    np.cumsum(np.concatenate(counts), out=starts[1:])
    return Packing(documents=np.concatenate(documents), starts=starts, first_pack=np.array(first_pack, dtype=np.int64))
