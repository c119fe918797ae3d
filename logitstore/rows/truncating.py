"""Truncates rows further while they are decoded, as if the store had been dumped with a smaller scheme.

This is possible only if the stored rows hold every entry that the smaller scheme would have kept
(`schemes.check_smaller`). The probability of dropped entries is added to the tail mass, so the sum of kept
probabilities and tail mass is unchanged. Label logprob and entropy are unchanged too.

The truncated rows may differ from a dump with the smaller scheme in two ways. First, among entries with equal codes,
this module keeps those with the smaller token ids, while the dump keeps the likelier entries. Second, this module ends
a nucleus where the decoded probabilities reach the mass, while the dump uses the exact probabilities.

In shapes, N is the number of rows and E the number of entries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from logitstore.format.codebook import LEVELS
from logitstore.rows import codec
from logitstore.rows.codec import LARGEST_TAIL
from logitstore.rows.rows import Rows

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from logitstore.format.schemes import Scheme
    from logitstore.format.spec import TargetSpec

PLACE_BITS = 16
"""Number of bits that hold the index of an entry in its row. A row has fewer than 2**16 entries."""
BLOCK_CELLS = 2**16
"""Maximum number of cells of a block. A block is a rectangle of rows and their entries that is sorted in one step.
Sorting a block of this size takes 2 MB of memory. Every row fits in a block, because a row has fewer than 2**16
entries."""


def decode(arrays: Mapping[str, NDArray[Any]], target: TargetSpec, scheme: Scheme | None = None) -> Rows:
    """Decodes the stored arrays of a `target` shard, and truncates the rows to a smaller scheme.

    Args:
        arrays: Stored arrays by name, without padding.
        target: Spec of the layer, with the scheme and the codebook of the stored arrays.
        scheme: A scheme that `check_smaller` allows; None keeps all entries.

    Returns:
        The N rows of the shard.
    """
    rows = codec.decode(arrays, target)
    if scheme is None or scheme == target.scheme:
        return rows
    return drop(rows, kept(rows, arrays["logprobs"], target, scheme))


def decode_bounds(
    arrays: Mapping[str, NDArray[Any]], target: TargetSpec, scheme: Scheme | None = None
) -> tuple[Rows, Rows]:
    """Decodes the smallest and the largest values that the stored codes allow, for the entries that `decode` keeps.

    Args:
        arrays: Stored arrays by name, without padding.
        target: Spec of the layer, with the scheme and the codebook of the stored arrays.
        scheme: A scheme that `check_smaller` allows; None keeps all entries.

    Returns:
        Two `Rows` objects: the first has the smallest logprobs and tail masses, the second has the largest.
    """
    least, most = codec.decode_bounds(arrays, target.codebook)
    if scheme is None or scheme == target.scheme:
        return least, most
    chosen = kept(codec.decode(arrays, target), arrays["logprobs"], target, scheme)
    return drop(least, chosen), drop(most, chosen)


def kept(rows: Rows, codes: NDArray[np.uint8], stored: TargetSpec, scheme: Scheme) -> NDArray[np.bool_]:
    """Finds the entries that a smaller scheme would have kept.

    Args:
        rows: The stored rows, decoded.
        codes: [E]: codes of the logprobs. A larger code is a smaller logprob.
        stored: Spec of the layer, with the scheme and the codebook of the stored rows.
        scheme: A scheme that `check_smaller` allows.

    Returns:
        [E]: whether each entry is kept.
    """
    counts, firsts = rows.counts[rows.counts > 0], rows.offsets[:-1][rows.counts > 0]
    # Each entry gets one integer as its sort key, with the code in the high bits and the index in the row in the low
    # bits. Entries with equal codes are thus sorted by token id. All rows of a block are read through windows of the
    # same width. The windows of the last rows may reach beyond the last entry, so extra cells are added at the end.
    cells = np.full(len(codes) + counts.max(initial=0), LEVELS << PLACE_BITS, dtype=np.int32)
    keys = cells[: len(codes)]
    keys[:] = codes
    keys <<= PLACE_BITS
    keys += np.arange(len(codes), dtype=np.int32)
    keys -= np.repeat(firsts.astype(np.int32), counts)
    last_keys = np.zeros(len(counts), dtype=np.int32)
    # Rows of similar counts are sorted together, so that one long row does not widen the rectangle of all others.
    by_count = np.argsort(counts.astype(np.uint16), kind="stable")
    for block in _blocks(counts[by_count]):
        some = by_count[block]
        num, first = counts[some], firsts[some]
        in_order = sliding_window_view(cells, num[-1])[first]
        # A window that is wider than its row also covers entries of the following rows. In this window, such entries
        # get the largest key, so that they sort last.
        if num[0] < num[-1]:
            in_order[np.arange(num[-1]) >= num[:, None]] = LEVELS << PLACE_BITS
        in_order.sort(axis=1)
        most = np.minimum(num, scheme.k)
        if scheme.name == "nucleus":
            # Decoding multiplies all probabilities of a row by one factor. The row's first entry gives this factor.
            scale = np.exp(rows.logprobs[first] - stored.codebook.table[codes[first]])
            reached = _entries_to_reach(in_order >> PLACE_BITS, scale, stored, scheme)
            if (stored.scheme.name, stored.scheme.mass) == ("nucleus", scheme.mass):
                # The stored nucleus has the same mass. With the exact probabilities, a row of more than k_min entries
                # needed all its entries to reach the mass, even if the decoded probabilities reach the mass sooner.
                reached = np.where(num > stored.scheme.k_min, num, reached)
            most = np.minimum(most, reached)
        # An entry is kept if its key is at most the key of the last kept entry of its row.
        last_keys[some] = in_order[np.arange(len(some)), most - 1]
    chosen: NDArray[np.bool_] = keys <= np.repeat(last_keys, counts)
    return chosen


def _blocks(counts: NDArray[np.int64]) -> Iterator[slice]:
    """Yields slices of rows, each of which fits in a block. At most half of a block's cells are empty.

    Args:
        counts: [N]: number of entries of each row, at least 1, in ascending order.
    """
    start = 0
    while start < len(counts):
        # No row of a block has more than twice as many entries as the block's first row, so at most half of the cells
        # are empty.
        stop = int(np.searchsorted(counts, 2 * counts[start], side="right"))
        stop = min(stop, start + int(BLOCK_CELLS // counts[stop - 1]))
        yield slice(start, stop)
        start = stop


def _entries_to_reach(
    codes: NDArray[np.int32], scale: NDArray[np.float32], stored: TargetSpec, scheme: Scheme
) -> NDArray[np.intp]:
    """Returns the number of likeliest entries that each row needs to reach the mass of a nucleus, but at least k_min.

    Args:
        codes: [N, K]: codes of the entries, in ascending order within each row; LEVELS beyond a row's last entry.
        scale: [N]: factor by which decoding multiplies the coded probabilities of each row.
        stored: Spec of the layer, with the codebook.
        scheme: A `nucleus` scheme, with the mass and k_min.

    Returns:
        [N]: number of entries for each row, at least 1. If all entries of a row together do not reach the mass, the
        result for this row is at least the row's number of entries.
    """
    # Cells beyond a row's last entry hold LEVELS instead of a code. The appended 0 is their probability.
    probs = np.append(np.exp(stored.codebook.table), np.float32(0.0))[codes]
    # An entry is needed if the likelier entries before it do not reach the mass.
    before = probs.cumsum(axis=1)
    before -= probs
    before *= scale[:, None]
    reached: NDArray[np.intp] = np.maximum((before < scheme.mass).sum(axis=1), scheme.k_min)
    return reached


def drop(rows: Rows, chosen: NDArray[np.bool_]) -> Rows:
    """Drops the entries of truncated rows that are not chosen, and adds their probability to the tail mass.

    Args:
        rows: Rows without weights.
        chosen: [E]: whether each entry is kept. A row that has entries must keep at least one of them.

    Returns:
        The same rows with the kept entries only.
    """
    there = rows.counts > 0
    firsts = rows.offsets[:-1][there]
    counts, tail_mass = rows.counts.copy(), rows.tail_mass.copy()
    if len(firsts):
        dropped = np.exp(rows.logprobs)
        dropped[chosen] = 0.0
        tail_mass[there] = np.minimum(tail_mass[there] + np.add.reduceat(dropped, firsts), LARGEST_TAIL)
        counts[there] = np.add.reduceat(chosen, firsts, dtype=np.int64)
    return Rows(
        counts=counts,
        token_ids=rows.token_ids[chosen],
        logprobs=rows.logprobs[chosen],
        weights=None,
        tail_mass=tail_mass,
        label_logprob=rows.label_logprob,
        entropy=rows.entropy,
    )
