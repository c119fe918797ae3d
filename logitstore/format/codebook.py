"""The 8-bit codes of logprobs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


LEVELS = 256
"""Codes of a logprob."""


@dataclass(frozen=True, kw_only=True)
class Codebook:
    """The 8-bit code of a logprob: code c stands for the probability ``((256 - c) / 256) ** exponent``.

    Equal steps of a root of the probability: an entry's part of the quantisation KL, about p times the square of its
    error, then hardly depends on p, and unlikely entries, of which there are many, share few codes.
    """

    exponent: float = 4.0
    """Which root. 2 spends the fewest codes on unlikely entries, more of them crowd less towards probability 1."""

    def __post_init__(self) -> None:
        if not 1.0 <= self.exponent <= 16.0:
            raise ValueError(f"exponent must be between 1 and 16, got exponent={self.exponent}; 4 is usual")

    @cached_property
    def table(self) -> NDArray[np.float32]:
        """Float32 [256]: the logprob that each code stands for, descending from 0."""
        table: NDArray[np.float32] = (self.exponent * np.log1p(-np.arange(LEVELS) / LEVELS)).astype(np.float32)
        return table

    @cached_property
    def boundaries(self) -> NDArray[np.float32]:
        """Float32 [255], ascending: the code of a logprob is the number of boundaries below its negative.

        Halfway between neighbouring codes, so that encoding picks the nearest. The dump uses the same
        numbers on the device.
        """
        table = -self.table.astype(np.float64)
        return ((table[1:] + table[:-1]) / 2).astype(np.float32)

    def encode(self, logprobs: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Returns the nearest code of each logprob; same shape."""
        codes: NDArray[np.uint8] = np.searchsorted(self.boundaries, -logprobs).astype(np.uint8)
        return codes

    def code_at(self, probability: float) -> int:
        """Returns the first code that reaches down to a probability; no code above it does."""
        return int(np.searchsorted(self.boundaries, -np.log(probability)))

    def lower_end(self, code: int) -> float:
        """Returns the least probability that has a code; 0 of the last."""
        return float(np.exp(-np.float64(self.boundaries[code]))) if code < LEVELS - 1 else 0.0

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as JSON values."""
        return asdict(self)
