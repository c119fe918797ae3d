"""Rows <-> the arrays of a `target` shard as they are stored. Pure functions over NumPy arrays, no I/O.

N rows, E entries.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from logitstore.rows import Rows, row_sums

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

LARGEST_TAIL = np.float32(1 - 2.0**-24)
"""A row that counts keeps something, if less than rounding leaves beside its tail: no logprob is -inf or NaN."""
MANTISSA_BITS = 12
"""Bits of mantissa kept of stored per-row floats: a relative error of at most 2**-13."""


@dataclass(frozen=True, kw_only=True)
class Codebook:
    """The 8-bit code of a logprob: code c stands for ``-range_nats * (c / 255) ** exponent``.

    An exponent above 1 spends the codes near 0, where the probability is.
    """

    range_nats: float = 16.0
    """Logprobs below minus this are stored as minus this."""
    exponent: float = 2.0
    """How strongly codes crowd towards logprob 0; 1 is linear."""

    def __post_init__(self) -> None:
        if not 1.0 <= self.range_nats <= 100.0:
            raise ValueError(f"range_nats must be between 1 and 100, got range_nats={self.range_nats}; 16 is usual")
        if not 1.0 <= self.exponent <= 8.0:
            raise ValueError(f"exponent must be between 1 and 8, got exponent={self.exponent}; 2 is usual")

    @cached_property
    def table(self) -> NDArray[np.float32]:
        """Float32 [256]: the logprob that each code stands for, descending from 0."""
        table: NDArray[np.float32] = (-self.range_nats * (np.arange(256) / 255.0) ** self.exponent).astype(np.float32)
        return table

    @cached_property
    def boundaries(self) -> NDArray[np.float32]:
        """Float32 [255], ascending: the code of a logprob is the number of boundaries below its negative.

        Halfway between neighbouring codes, so that encoding picks the nearest. The dump uses the same
        numbers on the device.
        """
        table = -self.table.astype(np.float64)
        return ((table[1:] + table[:-1]) / 2).astype(np.float32)

    @cached_property
    def max_errors(self) -> NDArray[np.float32]:
        """Float32 [256]: half the wider step beside each code, the most by which coding moves a logprob, in nats."""
        steps = np.diff(-self.table)
        wider = np.maximum(np.append(steps, 0.0), np.insert(steps, 0, 0.0))
        errors: NDArray[np.float32] = (wider / 2).astype(np.float32)
        return errors

    def encode(self, logprobs: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Returns the nearest code of each logprob; same shape."""
        codes: NDArray[np.uint8] = np.searchsorted(self.boundaries, -logprobs).astype(np.uint8)
        return codes

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as JSON values."""
        return asdict(self)


def round_mantissa(values: NDArray[np.float32], bits: int = MANTISSA_BITS) -> NDArray[np.float32]:
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


def encode(rows: Rows, codebook: Codebook) -> dict[str, NDArray[Any]]:
    """Turns rows into the arrays of a `target` shard (docs/format.md). Inverse of `decode` up to the codes' step."""
    with np.errstate(divide="ignore"):
        tail = np.log(rows.tail_mass)
    return {
        "counts": rows.counts.astype(np.uint16),
        "token_ids": rows.token_ids.astype(np.uint32),
        "logprobs": codebook.encode(rows.logprobs),
        "tail": round_mantissa(tail),
        "label_logprob": round_mantissa(rows.label_logprob),
        "entropy": round_mantissa(rows.entropy),
    }


def decode(arrays: Mapping[str, NDArray[Any]], codebook: Codebook) -> Rows:
    """Turns the stored arrays of a `target` shard into rows.

    Coded probabilities of a row can sum to more than it had: they are scaled so that kept probabilities plus tail
    mass are 1, which moves every logprob of a row by the same, at most its largest coding error.
    """
    counts = arrays["counts"].astype(np.int64)
    logprobs = codebook.table[arrays["logprobs"]]
    with np.errstate(invalid="ignore"):
        tail_mass = np.minimum(np.exp(arrays["tail"]), LARGEST_TAIL)
    kept = counts > 0
    with np.errstate(divide="ignore"):
        shift = np.log1p(-tail_mass[kept]) - np.log(row_sums(np.exp(logprobs), counts[kept]))
    logprobs += np.repeat(shift.astype(np.float32), counts[kept])
    return Rows(
        counts=counts,
        token_ids=arrays["token_ids"],
        logprobs=logprobs,
        tail_mass=tail_mass,
        label_logprob=arrays["label_logprob"],
        entropy=arrays["entropy"],
    )


def decode_bounds(arrays: Mapping[str, NDArray[Any]], codebook: Codebook) -> tuple[Rows, Rows]:
    """Returns the rows at the least and at the most that the stored codes allow.

    A code is the nearest one, so that the logprob that was encoded lies between the boundaries beside it; below the
    last boundary it may be anything. The tail's log was rounded to `MANTISSA_BITS`. Entries are in the order of
    `decode`; kept probabilities and tail sum to at most 1 in the first and at least 1 in the second, up to the float32
    arithmetic of whoever encoded them. Label logprob and entropy are as stored.
    """
    least = np.append(-codebook.boundaries, np.float32(-np.inf))[arrays["logprobs"]]
    most = np.insert(-codebook.boundaries, 0, np.float32(0.0))[arrays["logprobs"]]
    # relative to the stored value, not to the true one: twice the rounding is more than enough
    widening = np.float32(2.0**-MANTISSA_BITS)
    rows = [
        Rows(
            counts=arrays["counts"].astype(np.int64),
            token_ids=arrays["token_ids"],
            logprobs=logprobs,
            tail_mass=np.exp(arrays["tail"] * factor),
            label_logprob=arrays["label_logprob"],
            entropy=arrays["entropy"],
        )
        for logprobs, factor in ((least, 1 + widening), (most, 1 - widening))
    ]
    return rows[0], rows[1]
