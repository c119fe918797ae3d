"""Fills packs with documents, and chooses the documents that are held out. Depends on NumPy only.

In shapes, D is the number of documents, P the number of packs, and S the number of shards.
"""

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
    """Packs of a store. They are the same in every epoch. All documents of a pack are in the same shard."""

    documents: NDArray[np.int64]
    """[D]: numbers of the documents that are trained on, pack by pack."""
    starts: NDArray[np.int64]
    """[P + 1]: pack i holds documents[starts[i] : starts[i + 1]]."""
    first_pack: NDArray[np.int64]
    """[S + 1]: the documents of shard s fill the packs in range(first_pack[s], first_pack[s + 1])."""

    def __len__(self) -> int:
        return len(self.starts) - 1


def held_out(digests: NDArray[np.uint64], fraction: float) -> NDArray[np.bool_]:
    """Returns a mask of the documents that are held out: those whose digest is below fraction * 2**64.

    A digest depends only on the content of the document. At a given fraction, a document is therefore held out either
    in every store that contains it or in none. This stays true when a store grows.

    Args:
        digests: [D], digests of the documents from `DocumentIndex`.
        fraction: Fraction of the documents to hold out, at least 0 and below 1.

    Returns:
        Bool [D].
    """
    return digests < np.uint64(int(fraction * 2**64))


def best_fit(lengths: NDArray[np.int64], pack_length: int) -> NDArray[np.int64]:
    """Assigns documents to packs, beginning with the longest document.

    Each document goes to the fullest pack that still has room for it, or to a new pack if no pack has room.

    Args:
        lengths: [D], number of tokens in each document, from 1 to `pack_length`.
        pack_length: Maximum number of tokens in a pack.

    Returns:
        [D]: number of each document's pack. Packs are numbered from 0 without gaps.
    """
    by_length = np.argsort(-lengths, kind="stable")
    shortest = int(lengths.min(initial=1))
    rooms: list[int] = []  # the keys of packs_of, in ascending order
    packs_of: dict[int, list[int]] = {}  # packs that have room, keyed by the number of tokens that still fit
    found = np.empty(len(lengths), dtype=np.int64)
    num_packs = 0
    for document, length in zip(by_length.tolist(), lengths[by_length].tolist(), strict=True):
        # The smallest room that is large enough belongs to the fullest packs that can take this document.
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
        if room >= shortest:  # a pack with less room cannot take any other document
            if room not in packs_of:
                rooms.insert(bisect_left(rooms, room), room)
                packs_of[room] = []
            packs_of[room].append(pack)
    return found


def make_packing(index: DocumentIndex, *, pack_length: int | None, eval_fraction: float) -> Packing:
    """Fills packs with those documents of a store that are not held out.

    Args:
        index: Lengths and digests of the store's documents.
        pack_length: Maximum number of tokens in a pack; None puts each document into a separate pack.
        eval_fraction: Fraction of the documents to hold out. Held-out documents are not put into packs.
    """
    trained = ~held_out(index.digests, eval_fraction)
    # The lists begin with empty arrays, because np.concatenate refuses an empty list.
    documents, counts, first_pack = [np.empty(0, np.int64)], [np.empty(0, np.int64)], [0]
    # Shards are packed one by one, so that a reader needs only one shard to read a pack.
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
