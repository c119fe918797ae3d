"""Rows <-> the arrays of a `target` shard as they are stored. Pure functions over NumPy arrays, no I/O.

N rows, E entries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from logitstore.format.codebook import LEVELS, Codebook
from logitstore.rows.rows import Rows, row_sums

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from logitstore.format.spec import TargetSpec

LARGEST_TAIL = np.float32(1 - 2.0**-24)
"""A row that counts keeps something, if less than rounding leaves beside its tail: no logprob is -inf or NaN."""
MANTISSA_BITS = 7
"""Bits of mantissa kept of a row's floats: a relative error of at most 2**-8, that of bfloat16."""
LOSS_MANTISSA_BITS = 9
"""Of losses, which are subtracted from each other: at most 2**-10."""

PER_ENTRY = frozenset({"gaps", "logprobs", "draws"})
"""Arrays that have a value for each entry; the others have one for each row."""


def round_mantissa(values: NDArray[np.float32], bits: int = LOSS_MANTISSA_BITS) -> NDArray[np.float32]:
    """Rounds float32 values to `bits` bits of mantissa, so that their last bytes compress to nothing.

    Infinities stay what they are. NaN becomes the one NaN of the format: others would compare as the fill value, and
    then be read as it, with another checksum. The relative error is at most ``2 ** -(bits + 1)``.
    """
    drop = 23 - bits
    words = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (words + np.uint32((1 << (drop - 1)) - 1) + ((words >> np.uint32(drop)) & np.uint32(1))) & np.uint32(
        0xFFFFFFFF ^ ((1 << drop) - 1)
    )
    special = np.where(np.isnan(values), np.float32(np.nan).view(np.uint32), words)
    return np.where(np.isfinite(values), rounded, special).astype(np.uint32).view(np.float32)


def encode(rows: Rows, spec: TargetSpec) -> dict[str, NDArray[Any]]:
    """Turns rows into the arrays of a `target` shard (docs/format.md). Inverse of `decode` up to the codes' step."""
    with np.errstate(divide="ignore"):
        tail = np.log(rows.tail_mass)
    draws = np.zeros(len(rows.token_ids), dtype=np.uint16)
    if spec.scheme.name == "sample" and rows.weights is not None:
        draws[:] = np.rint(rows.weights * spec.scheme.num_draws)
    return {
        "counts": rows.counts.astype(np.uint16),
        "gaps": gaps(rows.token_ids, rows.counts),
        "logprobs": _likeliest_alone(spec, rows.logprobs, rows.counts),
        "draws": draws,
        "tail": round_mantissa(tail, MANTISSA_BITS),
        "label_logprob": round_mantissa(rows.label_logprob, MANTISSA_BITS),
        "entropy": round_mantissa(rows.entropy, MANTISSA_BITS),
    }


def _likeliest_alone(spec: TargetSpec, logprobs: NDArray[np.float32], counts: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Codes logprobs, those that share the code of their row's likeliest entry by the next one.

    Which token is likeliest must survive: greedy decoding accepts that alone.
    """
    codes = spec.codebook.encode(logprobs)
    kept = counts[counts > 0]
    if not len(kept):
        return codes
    row = np.repeat(np.arange(len(kept)), kept)
    highest = np.maximum.reduceat(logprobs, _firsts(counts))[row]
    is_shared = (codes == np.minimum.reduceat(codes, _firsts(counts))[row]) & (logprobs < highest)
    codes += (is_shared & (codes != spec.last_exact_code) & (codes != LEVELS - 1)).astype(np.uint8)
    return codes


def gaps(token_ids: NDArray[Any], counts: NDArray[Any]) -> NDArray[np.uint32]:
    """Codes ids as what lies between them: rising ids of a row become small numbers, which compress best.

    Args:
        token_ids: [E], strictly rising within each row.
        counts: [N], summing to E.

    Returns:
        [E]: the first id of each row, then each id less the one before it, less 1.
    """
    ids = token_ids.astype(np.uint32, copy=False)
    differences = ids.copy()
    differences[1:] -= ids[:-1]  # less than 0 where a row begins, which is set right below
    differences -= np.uint32(1)
    first = _firsts(counts)
    differences[first] = ids[first]
    return differences


def ungap(differences: NDArray[np.uint32], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Inverse of `gaps`; [E]. What is no code of ids becomes numbers beyond any vocabulary, not other ids."""
    steps = differences.astype(np.int64) + 1
    first = _firsts(counts)
    steps[first] -= 1
    total = np.cumsum(steps)
    kept = counts[counts > 0]
    total -= np.repeat(total[first] - steps[first], kept)
    return total


def last_ids(differences: NDArray[np.uint32], counts: NDArray[Any]) -> NDArray[np.int64]:
    """Returns the largest id of each row that has entries, without making out the others."""
    if not len(differences):
        return np.zeros(0, dtype=np.int64)
    sums: NDArray[np.int64] = np.add.reduceat(differences, _firsts(counts), dtype=np.int64)
    return sums + counts[counts > 0].astype(np.int64) - 1


def _firsts(counts: NDArray[Any]) -> NDArray[np.int64]:
    """Returns where each row that has entries begins."""
    kept = counts[counts > 0].astype(np.int64)
    first: NDArray[np.int64] = np.cumsum(kept) - kept
    return first


def of_rows(arrays: Mapping[str, NDArray[Any]], rows: NDArray[np.intp]) -> dict[str, NDArray[Any]]:
    """Returns the arrays of some rows alone, in the order of their numbers in `rows`."""
    counts = arrays["counts"].astype(np.int64)
    ends = np.cumsum(counts)
    entries = np.concatenate([np.zeros(0, np.int64), *(np.arange(ends[i] - counts[i], ends[i]) for i in rows)])
    return {name: values[entries if name in PER_ENTRY else rows] for name, values in arrays.items()}


def decode(arrays: Mapping[str, NDArray[Any]], spec: TargetSpec) -> Rows:
    """Turns the stored arrays of a `target` shard into rows.

    Coded probabilities of a row can sum to more than it had: they are scaled so that kept probabilities plus tail
    mass are 1, which moves every logprob of a row by the same, at most its largest coding error.
    """
    counts = arrays["counts"].astype(np.int64)
    codes = arrays["logprobs"]
    logprobs = spec.codebook.table[codes]
    with np.errstate(invalid="ignore"):
        tail_mass = np.minimum(np.exp(arrays["tail"]), LARGEST_TAIL)
    kept = counts > 0
    with np.errstate(divide="ignore"):
        shift = np.log1p(-tail_mass[kept]) - np.log(row_sums(np.exp(logprobs), counts[kept]))
    logprobs += np.repeat(shift.astype(np.float32), counts[kept])
    return Rows(
        counts=counts,
        token_ids=ungap(arrays["gaps"], counts).astype(np.uint32),
        logprobs=logprobs,
        weights=_weights(arrays, logprobs, spec),
        tail_mass=tail_mass,
        label_logprob=arrays["label_logprob"],
        entropy=arrays["entropy"],
    )


def _weights(
    arrays: Mapping[str, NDArray[Any]], logprobs: NDArray[np.float32], spec: TargetSpec
) -> NDArray[np.float32] | None:
    if not spec.scheme.draws:
        return None
    step = np.float32(spec.step)
    if spec.scheme.name == "sample":
        return arrays["draws"] * step
    is_drawn = arrays["logprobs"] > spec.last_exact_code
    return np.where(is_drawn, step, np.exp(logprobs))


def decode_bounds(arrays: Mapping[str, NDArray[Any]], codebook: Codebook) -> tuple[Rows, Rows]:
    """Returns the rows at the least and at the most that the stored codes allow.

    A code is the nearest one, so that the logprob that was encoded lies between the boundaries beside it; below the
    last boundary it may be anything. The tail's log was rounded to `MANTISSA_BITS`. Entries are in the order of
    `decode`; kept probabilities and tail sum to at most 1 in the first and at least 1 in the second, up to the float32
    arithmetic of whoever encoded them. Label logprob and entropy are as stored. Without weights: these are exact.
    """
    counts = arrays["counts"].astype(np.int64)
    token_ids = ungap(arrays["gaps"], counts).astype(np.uint32)
    codes = arrays["logprobs"]
    least = np.append(-codebook.boundaries, np.float32(-np.inf))[codes]
    upper = codes.astype(np.int64)
    if len(codes):  # what would share the likeliest entry's code has the next one
        first = np.minimum.reduceat(upper, _firsts(counts))
        upper -= upper == np.repeat(first + 1, counts[counts > 0])
    most = np.insert(-codebook.boundaries, 0, np.float32(0.0))[upper]
    # relative to the stored value, not to the true one: twice the rounding is more than enough
    widening = np.float32(2.0**-MANTISSA_BITS)
    rows = [
        Rows(
            counts=counts,
            token_ids=token_ids,
            logprobs=logprobs,
            weights=None,
            tail_mass=np.exp(arrays["tail"] * factor),
            label_logprob=arrays["label_logprob"],
            entropy=arrays["entropy"],
        )
        for logprobs, factor in ((least, 1 + widening), (most, 1 - widening))
    ]
    return rows[0], rows[1]
