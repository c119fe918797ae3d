"""Assumed cost of a row, for plans without a measurement. Uses only NumPy.

The cost consists of the entries per row and the bits per entry. Both depend on the scheme.

The figures were measured in November 2026 with the code of the dump, on 2,048 to 20,000 rows of each of three models.
The models have the architecture of Llama, a few million weights and vocabularies of 2,048, 8,192 and 32,768 tokens.
They were trained for minutes on Python's documentation and code. The numbers of entries come from the model with the
largest vocabulary, at two temperatures, which give the two entropies in `ENTROPY`. On ordinary text, the entropy of
most targets is expected to lie between these two. The ranges of bits cover all three models.

For a real target the figures are a guess. A weak target keeps more entries: the target of the demo (entropy 3.9 nats)
keeps 50 % more. `logitstore plan --calibrate` replaces the figures with measured ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from logitstore.format.schemes import Scheme

ENTROPY = (1.2, 3.0)
"""Mean entropy of a row, in nats, for the two targets in the tables below: a confident one and an uncertain one."""

NUCLEUS_SIZES = {
    0.9: (
        (1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 5, 7, 9, 11, 22),
        (1, 2, 4, 6, 8, 11, 15, 20, 31, 46, 61, 91, 171, 436, 1024, 1024),
    ),
    0.95: (
        (1, 1, 2, 2, 3, 3, 3, 4, 5, 5, 6, 8, 10, 14, 18, 45),
        (1, 4, 7, 12, 18, 27, 37, 55, 82, 126, 188, 386, 898, 1024, 1024, 1024),
    ),
    0.98: (
        (1, 1, 2, 3, 3, 4, 5, 6, 8, 9, 11, 14, 17, 24, 35, 85),
        (3, 9, 17, 34, 62, 92, 141, 225, 365, 654, 1024, 1024, 1024, 1024, 1024, 1024),
    ),
    0.99: (
        (1, 1, 3, 3, 5, 6, 7, 8, 10, 13, 16, 20, 25, 36, 58, 133),
        (6, 19, 42, 80, 162, 280, 459, 826, 1024, 1024, 1024, 1024, 1024, 1024, 1024, 1024),
    ),
}
"""Number of tokens that a row must keep to reach a probability mass. The keys are the masses. The first tuple is for
the confident target of `ENTROPY`, the second for the uncertain one. A tuple holds sixteen numbers in ascending order.
Each of them stands for a sixteenth of the rows. The number 1024 means 1024 or more."""

DRAWS = (10, 20, 50, 100, 200)
"""Numbers of draws for which `DISTINCT` has figures."""
DISTINCT = {
    "sample": ((3.3, 4.4, 6.6, 8.8, 11.6), (5.9, 9.6, 18.1, 29.1, 46.6)),
    "hybrid": ((3.7, 5.1, 7.5, 9.9, 13.1), (6.6, 10.9, 20.8, 33.1, 53.3)),
}
"""Mean number of entries in a row, by scheme. The first tuple is for the confident target of `ENTROPY`, the second for
the uncertain one. A tuple holds a figure for each number in `DRAWS`."""

ID_SHARE = {"topk": (0.3, 0.8), "nucleus": (0.3, 0.8), "sample": (0.5, 1.0), "hybrid": (0.5, 1.0)}
"""Compressed bits of a token id, divided by log2(e V / n), where V is the vocabulary size and n the number of entries
in the row. An id would take log2(e V / n) bits if ids were random. Low and high estimate, by scheme."""
CODE_BITS = (5.9, 8.0)
"""Compressed bits of the code of a logprob; low and high estimate."""
DRAW_BITS = (1.0, 4.7)
"""Compressed bits of the number of draws of an id, for `sample` only; low and high estimate."""
COUNT_BYTES = {"topk": (0.0, 0.1), "nucleus": (0.3, 0.7), "sample": (0.4, 1.0), "hybrid": (0.4, 1.0)}
"""Compressed bytes of one value of the array `counts` (the number of entries of a row); low and high estimate, by
scheme."""
FLOAT_BYTES = (3.5, 4.2)
"""Compressed bytes of the tail, the label logprob and the entropy of a row together; low and high estimate."""
LOSS_BYTES = (3.0, 4.0)
"""Compressed bytes of the two floats of a row in a losses layer; low and high estimate."""


STANDARD_ERRORS = 2.0
"""Distance from an estimate to either end of its range, in standard errors."""


@dataclass(frozen=True, slots=True)
class Range:
    """Estimated range of a number. Sums and products combine low with low, and high with high."""

    low: float
    high: float

    def __add__(self, other: Range) -> Range:
        return Range(self.low + other.low, self.high + other.high)

    def __mul__(self, other: Range | float) -> Range:
        low, high = (other.low, other.high) if isinstance(other, Range) else (other, other)
        return Range(self.low * low, self.high * high)

    @staticmethod
    def exactly(value: float) -> Range:
        """Returns the range of a number that is known exactly."""
        return Range(value, value)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Cost of a row for one truncation scheme: the stored size of a row that counts, and the computing time."""

    entries: Range
    """Number of entries in a row that counts."""
    target_bytes: Range
    """Compressed bytes of a row that counts, summed over the arrays of `target`."""
    loss_bytes: Range
    """Compressed bytes of a row that counts, in each losses layer."""
    rows_per_s: float | None = None
    """Number of rows per second, if all models process each row, one model after the other. Includes rows that do not
    count. None if unknown."""


def assumed(scheme: Scheme, vocab_size: int) -> Cost:
    """Returns the assumed cost of a row, without a computing time.

    Args:
        scheme: Truncation scheme.
        vocab_size: Size V of the vocabulary.
    """
    entries = Range(*(min(_entries(scheme, which), vocab_size) for which in (0, 1)))
    drawn = DRAW_BITS if scheme.name == "sample" else (0.0, 0.0)
    target_bytes = []
    for which, num in enumerate((entries.low, entries.high)):
        # Ids are stored as gaps between them. With more entries, the gaps are smaller and take fewer bits.
        bits = ID_SHARE[scheme.name][which] * math.log2(math.e * vocab_size / num) + CODE_BITS[which] + drawn[which]
        target_bytes.append(num * bits / 8 + COUNT_BYTES[scheme.name][which] + FLOAT_BYTES[which])
    return Cost(entries=entries, target_bytes=Range(*target_bytes), loss_bytes=Range(*LOSS_BYTES))


def _entries(scheme: Scheme, which: int) -> float:
    """Returns the mean number of entries in a row, for the confident target (`which` is 0) or the uncertain one (1)."""
    if scheme.name == "topk":
        return float(scheme.k)
    if scheme.name == "nucleus":
        # Sizes are interpolated between the masses in the table. log(size) is taken as a function of -log(1 - mass).
        masses = -np.log1p(-np.array(list(NUCLEUS_SIZES)))
        logs = np.log([sizes[which] for sizes in NUCLEUS_SIZES.values()])
        # With a mass of 1, the logarithm would be infinite.
        wanted = -np.log1p(-min(scheme.mass, 1 - 1e-6))
        sizes = [np.exp(_line(wanted, masses, column)) for column in logs.T]
        return float(np.clip(sizes, scheme.k_min, scheme.k).mean())
    entries = np.exp(_line(np.log(scheme.num_draws), np.log(DRAWS), np.log(DISTINCT[scheme.name][which])))
    return float(np.clip(entries, 1.0, scheme.num_draws))


def _line(x: float, xs: Sequence[float] | np.ndarray, ys: np.ndarray) -> float:
    """Interpolates linearly between points, and extrapolates with the slope of the nearest two points."""
    i = int(np.clip(np.searchsorted(xs, x), 1, len(xs) - 1))
    return float(ys[i - 1] + (x - xs[i - 1]) * (ys[i] - ys[i - 1]) / (xs[i] - xs[i - 1]))
