"""Encodes rows as the stored arrays of a `target` shard, and decodes them. Pure functions over NumPy arrays, no I/O.

In shapes, N is the number of rows and E the number of entries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from logitstore.rows.rows import Rows, row_sums

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from logitstore.format.codebook import Codebook
    from logitstore.format.spec import TargetSpec

LARGEST_TAIL = np.float32(1 - 2.0**-24)
"""Maximum tail mass of a decoded row: the largest float32 below 1. Rounding may make the stored tail mass 1 although
the row has entries. With this limit, no decoded logprob is -inf or NaN."""
MANTISSA_BITS = 7
"""Number of mantissa bits of the stored floats of `target`, the same as in bfloat16. The relative error is at most
2**-8."""
LOSS_MANTISSA_BITS = 9
"""Number of mantissa bits of stored losses. The relative error is at most 2**-10. Losses keep more bits than the floats
of `target`, because losses are subtracted from each other."""

PER_ENTRY = frozenset({"gaps", "logprobs", "draws"})
"""Names of the arrays with one value per entry. The other arrays of `target` have one value per row."""


def round_mantissa(values: NDArray[np.float32], bits: int = LOSS_MANTISSA_BITS) -> NDArray[np.float32]:
    """Rounds float32 values to `bits` bits of mantissa, ties to even. The other bits become 0 and compress well.

    Infinities are unchanged. Every NaN becomes the same NaN as the fill value. Zarr treats all NaNs as the fill value
    and may not store them, so a reader may get the NaN of the fill value instead. A checksum over any other NaN would
    then differ between writer and reader.

    Args:
        values: Float32 values of any shape.
        bits: Number of mantissa bits to keep.

    Returns:
        Float32 values of the same shape, with a relative error of at most ``2 ** -(bits + 1)``.
    """
    drop = 23 - bits
    words = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    # Adds half a unit of the lowest kept bit, minus 1, plus the value of that bit. This rounds ties to even. If the
    # mantissa overflows, the carry increases the exponent, which is the correct result.
    rounded = (words + np.uint32((1 << (drop - 1)) - 1) + ((words >> np.uint32(drop)) & np.uint32(1))) & np.uint32(
        0xFFFFFFFF ^ ((1 << drop) - 1)
    )
    special = np.where(np.isnan(values), np.float32(np.nan).view(np.uint32), words)
    return np.where(np.isfinite(values), rounded, special).astype(np.uint32).view(np.float32)


def pack(
    *,
    counts: NDArray[Any],
    token_ids: NDArray[Any],
    codes: NDArray[np.uint8],
    draws: NDArray[Any],
    tail: NDArray[np.float32],
    label_logprob: NDArray[np.float32],
    entropy: NDArray[np.float32],
) -> dict[str, NDArray[Any]]:
    """Returns the arrays of a `target` shard (docs/format.md) for rows whose logprobs are already encoded.

    Args:
        counts: [N]: number of entries of each row; they sum to E.
        token_ids: [E]: token ids of the entries, strictly rising within each row.
        codes: [E]: codes of the entries' logprobs.
        draws: [E]: number of times that each entry was drawn; 0 for all schemes but `sample`.
        tail: Float32 [N]: log of the tail mass; -inf if the tail is empty, NaN where the loss mask is 0.
        label_logprob: Float32 [N]: logprob of the next token of the document; NaN where the loss mask is 0.
        entropy: Float32 [N]: entropy of the whole distribution in nats; NaN where the loss mask is 0.
    """
    return {
        "counts": counts.astype(np.uint16),
        "gaps": gaps(token_ids, counts),
        "logprobs": codes,
        "draws": draws.astype(np.uint16),
        "tail": round_mantissa(tail, MANTISSA_BITS),
        "label_logprob": round_mantissa(label_logprob, MANTISSA_BITS),
        "entropy": round_mantissa(entropy, MANTISSA_BITS),
    }


def gaps(token_ids: NDArray[Any], counts: NDArray[Any]) -> NDArray[np.uint32]:
    """Encodes the token ids of each row as gaps between neighbouring ids, which are small numbers and compress well.

    Args:
        token_ids: [E]: token ids, strictly rising within each row.
        counts: [N]: number of entries of each row; they sum to E.

    Returns:
        [E]: for the first entry of each row its id, and for every other entry its id minus the id before it, minus 1.
    """
    ids = token_ids.astype(np.uint32, copy=False)
    differences = ids.copy()
    differences[1:] -= ids[:-1]  # May wrap around at the first entry of a row, which is overwritten below.
    differences -= np.uint32(1)
    first = _firsts(counts)
    differences[first] = ids[first]
    return differences


def ungap(differences: NDArray[np.uint32], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Decodes the token ids of each row from their gaps. Inverse of `gaps`.

    Args:
        differences: [E]: gaps as `gaps` returns them.
        counts: [N]: number of entries of each row; they sum to E.

    Returns:
        Int64 [E]: token ids. The ids never wrap around: if the gaps of a row are malformed and their sum needs more
        than 32 bits, the last ids are larger than any vocabulary.
    """
    steps = differences.astype(np.int64) + 1
    first = _firsts(counts)
    # The first id of a row is stored as it is. One running sum covers the entries of all rows, so the part of the sum
    # that belongs to earlier rows is subtracted.
    steps[first] -= 1
    total = np.cumsum(steps)
    kept = counts[counts > 0]
    total -= np.repeat(total[first] - steps[first], kept)
    return total


def last_ids(differences: NDArray[np.uint32], counts: NDArray[Any]) -> NDArray[np.int64]:
    """Returns the largest token id of each row that has entries, without decoding the other ids.

    Args:
        differences: [E]: gaps as `gaps` returns them.
        counts: [N]: number of entries of each row; they sum to E.

    Returns:
        Int64 [number of rows with entries]: the largest ids.
    """
    if not len(differences):
        return np.zeros(0, dtype=np.int64)
    # The first gap of a row is an id. Every other gap is 1 less than the difference between two neighbouring ids.
    sums: NDArray[np.int64] = np.add.reduceat(differences, _firsts(counts), dtype=np.int64)
    return sums + counts[counts > 0].astype(np.int64) - 1


def _firsts(counts: NDArray[Any]) -> NDArray[np.int64]:
    """Returns the index of the first entry of each row that has entries."""
    kept = counts[counts > 0].astype(np.int64)
    first: NDArray[np.int64] = np.cumsum(kept) - kept
    return first


def of_rows(arrays: Mapping[str, NDArray[Any]], rows: NDArray[np.intp]) -> dict[str, NDArray[Any]]:
    """Selects rows from the stored arrays of a `target` shard.

    Args:
        arrays: Stored arrays by name, without padding.
        rows: Indices of the rows.

    Returns:
        The arrays of these rows, in the order of `rows`.
    """
    counts = arrays["counts"].astype(np.int64)
    ends = np.cumsum(counts)
    entries = np.concatenate([np.zeros(0, np.int64), *(np.arange(ends[i] - counts[i], ends[i]) for i in rows)])
    return {name: values[entries if name in PER_ENTRY else rows] for name, values in arrays.items()}


def decode(arrays: Mapping[str, NDArray[Any]], spec: TargetSpec) -> Rows:
    """Decodes the stored arrays of a `target` shard into rows.

    The probabilities that the codes of a row stand for are rounded, so they may sum to more or less than the original
    probabilities. Decoding scales the rounded probabilities so that they sum to 1 together with the tail mass. Scaling
    adds the same amount to all logprobs of a row. This amount is at most the largest rounding error of the row's codes.

    Args:
        arrays: Stored arrays by name, without padding.
        spec: Spec of the layer, with its scheme and codebook.

    Returns:
        N rows with E entries in all. The entries have weights if the scheme draws entries.
    """
    counts = arrays["counts"].astype(np.int64)
    codes = arrays["logprobs"]
    logprobs = spec.codebook.table[codes]
    # The tail is NaN at rows that do not count, which NumPy would report as invalid.
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
    # sample: each draw adds `step` to the weight. hybrid: the weight is `step` for drawn entries, whose codes are above
    # `last_exact_code`, and the probability for the other entries.
    if spec.scheme.name == "sample":
        return arrays["draws"] * step
    is_drawn = arrays["logprobs"] > spec.last_exact_code
    return np.where(is_drawn, step, np.exp(logprobs))


def decode_bounds(arrays: Mapping[str, NDArray[Any]], codebook: Codebook) -> tuple[Rows, Rows]:
    """Decodes the smallest and the largest values that the stored codes allow.

    The exact logprob of an entry lies between the two boundaries of the entry's code. The last code has no lower
    boundary, so its smallest logprob is -inf. The log of the tail mass was rounded to `MANTISSA_BITS`, which gives the
    bounds of the tail mass. Label logprobs and entropies are returned as stored. Weights are None.

    Args:
        arrays: Stored arrays by name, without padding.
        codebook: Codebook of the layer.

    Returns:
        Two `Rows` objects: the first has the smallest logprobs and tail masses, the second has the largest. The order
        of the entries is the same as in `decode`. The kept probabilities and the tail mass of a row sum to at most 1 in
        the first object, and to at least 1 in the second, apart from float32 rounding errors of the encoder.
    """
    counts = arrays["counts"].astype(np.int64)
    token_ids = ungap(arrays["gaps"], counts).astype(np.uint32)
    codes = arrays["logprobs"]
    least = np.append(-codebook.boundaries, np.float32(-np.inf))[codes]
    upper = codes.astype(np.int64)
    # In each row, the encoder gives the smallest code to the likeliest entry only, and moves other entries that round
    # to this code to the next code. If the code of an entry is 1 above the smallest, the exact logprob of the entry may
    # thus be above the upper boundary of its code.
    if len(codes):
        first = np.minimum.reduceat(upper, _firsts(counts))
        upper -= upper == np.repeat(first + 1, counts[counts > 0])
    most = np.insert(-codebook.boundaries, 0, np.float32(0.0))[upper]
    # Rounding changes the log of the tail mass by at most 2**-8 of its exact value. The exact value is unknown here, so
    # twice this fraction of the stored value is used, which is enough.
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
