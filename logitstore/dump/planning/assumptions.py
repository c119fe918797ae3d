"""What rows are assumed to cost where nothing was measured: entries a row and bits an entry, by scheme. NumPy only.

Measured in November 2026 by the dump's own code on 2,048 to 20,000 rows each of three Llama-shaped models of a few
million weights (vocabularies of 2,048, 8,192 and 32,768), trained for minutes on Python's documentation and code. The
counts of entries are those of the largest vocabulary, cooled by temperature to the two entropies below, between which
most targets are expected on ordinary text; the bits span all three. Of a real target they are a guess: a weak one, such
as the demo's of 3.9 nats, keeps half as many entries again. `logitstore plan --calibrate` replaces them.
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
"""Mean entropy of a row, nats, of the two targets that the tables are of: one sure of itself, one that is not."""

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
"""Tokens that reach a mass, by mass: at sixteen equally likely rows of each of the two targets; 1024: or more."""

DRAWS = (10, 20, 50, 100, 200)
DISTINCT = {
    "sample": ((3.3, 4.4, 6.6, 8.8, 11.6), (5.9, 9.6, 18.1, 29.1, 46.6)),
    "hybrid": ((3.7, 5.1, 7.5, 9.9, 13.1), (6.6, 10.9, 20.8, 33.1, 53.3)),
}
"""Entries a row of so many draws, of each of the two targets."""

ID_SHARE = {"topk": (0.3, 0.8), "nucleus": (0.3, 0.8), "sample": (0.5, 1.0), "hybrid": (0.5, 1.0)}
"""Bits of an id, over log2(e V / entries), which ids without any pattern would take."""
CODE_BITS = (5.9, 8.0)
DRAW_BITS = (1.0, 4.7)
"""Of `sample` alone: how often an id was drawn."""
COUNT_BYTES = {"topk": (0.0, 0.1), "nucleus": (0.3, 0.7), "sample": (0.4, 1.0), "hybrid": (0.4, 1.0)}
FLOAT_BYTES = (3.5, 4.2)
"""Tail, label logprob and entropy of a row."""
LOSS_BYTES = (3.0, 4.0)
"""Two floats of a row, of each model whose losses are kept."""


STANDARD_ERRORS = 2.0
"""How far a range of what was estimated from a sample goes to either side."""


@dataclass(frozen=True, slots=True)
class Range:
    """What a number lies between, as far as is known."""

    low: float
    high: float

    def __add__(self, other: Range) -> Range:
        return Range(self.low + other.low, self.high + other.high)

    def __mul__(self, other: Range | float) -> Range:
        low, high = (other.low, other.high) if isinstance(other, Range) else (other, other)
        return Range(self.low * low, self.high * high)

    @staticmethod
    def exactly(value: float) -> Range:
        """A number that is known."""
        return Range(value, value)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a row that counts takes of a store, by some scheme; and what computing rows takes."""

    entries: Range
    """Entries a row."""
    target_bytes: Range
    """Of all arrays of `target`, compressed."""
    loss_bytes: Range
    """Of each losses layer."""
    rows_per_s: float | None = None
    """Rows of any kind through all models, each scored once; None where that is not known."""


def assumed(scheme: Scheme, vocab_size: int) -> Cost:
    """Returns what rows are assumed to cost."""
    entries = Range(*(min(_entries(scheme, which), vocab_size) for which in (0, 1)))
    drawn = DRAW_BITS if scheme.name == "sample" else (0.0, 0.0)
    target_bytes = []
    for which, num in enumerate((entries.low, entries.high)):
        # The more entries lie in a vocabulary, the fewer bits the gap to the next one takes.
        bits = ID_SHARE[scheme.name][which] * math.log2(math.e * vocab_size / num) + CODE_BITS[which] + drawn[which]
        target_bytes.append(num * bits / 8 + COUNT_BYTES[scheme.name][which] + FLOAT_BYTES[which])
    return Cost(entries=entries, target_bytes=Range(*target_bytes), loss_bytes=Range(*LOSS_BYTES))


def _entries(scheme: Scheme, which: int) -> float:
    """Returns entries a row of one of the two targets."""
    if scheme.name == "topk":
        return float(scheme.k)
    if scheme.name == "nucleus":
        masses = -np.log1p(-np.array(list(NUCLEUS_SIZES)))
        logs = np.log([sizes[which] for sizes in NUCLEUS_SIZES.values()])
        wanted = -np.log1p(-min(scheme.mass, 1 - 1e-6))
        sizes = [np.exp(_line(wanted, masses, column)) for column in logs.T]
        return float(np.clip(sizes, scheme.k_min, scheme.k).mean())
    entries = np.exp(_line(np.log(scheme.num_draws), np.log(DRAWS), np.log(DISTINCT[scheme.name][which])))
    return float(np.clip(entries, 1.0, scheme.num_draws))


def _line(x: float, xs: Sequence[float] | np.ndarray, ys: np.ndarray) -> float:
    """Interpolates between points, and goes on beyond them as between the last two."""
    i = int(np.clip(np.searchsorted(xs, x), 1, len(xs) - 1))
    return float(ys[i - 1] + (x - xs[i - 1]) * (ys[i] - ys[i - 1]) / (xs[i] - xs[i - 1]))
