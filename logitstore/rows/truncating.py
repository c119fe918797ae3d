"""A store read as if it had been dumped with a smaller scheme: its rows are truncated further as they are decoded.

Only where the stored rows hold all that the smaller scheme would have kept. What a row loses goes to its tail mass, so
that kept probabilities and tail sum to what they did; label logprob and entropy stay. Of entries whose codes are equal,
of which the dump would have kept the likelier ones, those with the lower ids are kept; and a nucleus ends where the
decoded probabilities reach its mass. N rows, E entries.
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
"""A row has fewer than 2**16 entries."""
BLOCK_CELLS = 2**16
"""Most cells of a rectangle of rows and entries that is worked on at once: 2 MB. No row has as many entries."""


def decode(arrays: Mapping[str, NDArray[Any]], target: TargetSpec, scheme: Scheme | None = None) -> Rows:
    """Decodes the stored arrays of a `target` shard, and truncates the rows to a smaller scheme.

    Args:
        arrays: The stored arrays, without padding.
        target: How they were truncated and coded.
        scheme: A scheme that `check_smaller` allows; None keeps all entries.
    """
    rows = codec.decode(arrays, target)
    if scheme is None or scheme == target.scheme:
        return rows
    return drop(rows, kept(rows, arrays["logprobs"], target, scheme))


def decode_bounds(
    arrays: Mapping[str, NDArray[Any]], target: TargetSpec, scheme: Scheme | None = None
) -> tuple[Rows, Rows]:
    """Returns the rows of `decode` at the least and at the most that the stored codes allow, and so their tails."""
    least, most = codec.decode_bounds(arrays, target.codebook)
    if scheme is None or scheme == target.scheme:
        return least, most
    chosen = kept(codec.decode(arrays, target), arrays["logprobs"], target, scheme)
    return drop(least, chosen), drop(most, chosen)


def kept(rows: Rows, codes: NDArray[np.uint8], stored: TargetSpec, scheme: Scheme) -> NDArray[np.bool_]:
    """Finds the entries that a smaller scheme would have kept.

    Args:
        rows: As stored, decoded.
        codes: [E]: codes of the logprobs, which rise as these fall.
        stored: How the rows were truncated and coded.
        scheme: `check_smaller` has passed.

    Returns:
        [E]
    """
    counts, firsts = rows.counts[rows.counts > 0], rows.offsets[:-1][rows.counts > 0]
    # One number by which the entries of a row sort: code, then place. Cells at the end are no entry of any row.
    cells = np.full(len(codes) + counts.max(initial=0), LEVELS << PLACE_BITS, dtype=np.int32)
    keys = cells[: len(codes)]
    keys[:] = codes
    keys <<= PLACE_BITS
    keys += np.arange(len(codes), dtype=np.int32)
    keys -= np.repeat(firsts.astype(np.int32), counts)
    last_keys = np.zeros(len(counts), dtype=np.int32)
    # Rows of like counts are worked on together: one of many entries makes no wide rectangle of all.
    by_count = np.argsort(counts.astype(np.uint16), kind="stable")
    for block in _blocks(counts[by_count]):
        some = by_count[block]
        num, first = counts[some], firsts[some]
        in_order = sliding_window_view(cells, num[-1])[first]
        if num[0] < num[-1]:
            in_order[np.arange(num[-1]) >= num[:, None]] = LEVELS << PLACE_BITS
        in_order.sort(axis=1)
        most = np.minimum(num, scheme.k)
        if scheme.name == "nucleus":
            scale = np.exp(rows.logprobs[first] - stored.codebook.table[codes[first]])
            reached = _reached(in_order >> PLACE_BITS, scale, stored, scheme)
            if (stored.scheme.name, stored.scheme.mass) == ("nucleus", scheme.mass):
                # The exact probabilities needed all that is stored beyond k_min; decoded ones may seem to need less.
                reached = np.where(num > stored.scheme.k_min, num, reached)
            most = np.minimum(most, reached)
        last_keys[some] = in_order[np.arange(len(some)), most - 1]
    chosen: NDArray[np.bool_] = keys <= np.repeat(last_keys, counts)
    return chosen


def _blocks(counts: NDArray[np.int64]) -> Iterator[slice]:
    """Yields rows that make a rectangle of at most `BLOCK_CELLS`, and of at most twice as many cells as entries.

    Args:
        counts: [N], rising, each at least 1.
    """
    start = 0
    while start < len(counts):
        stop = int(np.searchsorted(counts, 2 * counts[start], side="right"))
        stop = min(stop, start + int(BLOCK_CELLS // counts[stop - 1]))
        yield slice(start, stop)
        start = stop


def _reached(
    codes: NDArray[np.int32], scale: NDArray[np.float32], stored: TargetSpec, scheme: Scheme
) -> NDArray[np.intp]:
    """Returns how many of its entries each row needs to reach a mass, and k_min.

    Args:
        codes: [N, K], ascending; LEVELS beyond a row's entries.
        scale: [N]: what the coded probabilities of each row are multiplied by when they are decoded.
        stored: Has the codebook.
        scheme: A nucleus.

    Returns:
        [N], at least 1. More than a row has where that does not suffice.
    """
    probs = np.append(np.exp(stored.codebook.table), np.float32(0.0))[codes]
    before = probs.cumsum(axis=1)
    before -= probs
    before *= scale[:, None]
    reached: NDArray[np.intp] = np.maximum((before < scheme.mass).sum(axis=1), scheme.k_min)
    return reached


def drop(rows: Rows, chosen: NDArray[np.bool_]) -> Rows:
    """Keeps some entries of truncated rows, and adds the probability of the others to the tails.

    Args:
        rows: Without weights.
        chosen: [E]; at least one of each row that has entries.
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
