"""The 8-bit codes of logprobs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


LEVELS = 256
"""Number of different codes: a code is between 0 and 255."""


@dataclass(frozen=True, kw_only=True)
class Codebook:
    """The 8-bit codes of logprobs: code c stands for the probability ``((256 - c) / 256) ** exponent``.

    Neighbouring codes differ by the same step in ``p ** (1 / exponent)``, where p is the probability. Rounding the
    logprob of an entry to a code adds about p times the square of the rounding error to the KL divergence. Because the
    steps are equal, this increase of the KL divergence depends only weakly on p. Most of the codes stand for larger
    probabilities. Entries of small probability, of which a store has many, share few codes.
    """

    exponent: float = 4.0
    """Exponent of the formula above, 1 to 16. A larger exponent gives more codes to unlikely entries, and fewer to
    probabilities near 1."""

    def __post_init__(self) -> None:
        if not 1.0 <= self.exponent <= 16.0:
            raise ValueError(f"exponent must be between 1 and 16, got exponent={self.exponent}; 4 is usual")

    @cached_property
    def table(self) -> NDArray[np.float32]:
        """Float32 [256]: logprob that each code stands for, in descending order. The first is 0."""
        # The logarithm of the formula in the class docstring: log((256 - c) / 256) = log1p(-c / 256).
        table: NDArray[np.float32] = (self.exponent * np.log1p(-np.arange(LEVELS) / LEVELS)).astype(np.float32)
        return table

    @cached_property
    def boundaries(self) -> NDArray[np.float32]:
        """Float32 [255]: boundaries between the negated logprobs of neighbouring codes, in ascending order.

        The code of a logprob is the number of boundaries that are smaller than -logprob. Each boundary is halfway
        between the logprobs of two neighbouring codes, so encoding picks the nearest code. The dump encodes with the
        same boundaries on the GPU.
        """
        # Computed in float64, so that only the final result is rounded to float32.
        table = -self.table.astype(np.float64)
        return ((table[1:] + table[:-1]) / 2).astype(np.float32)

    def encode(self, logprobs: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Returns the nearest code of each logprob.

        Args:
            logprobs: Float32 logprobs of any shape.

        Returns:
            Uint8 codes of the same shape.
        """
        codes: NDArray[np.uint8] = np.searchsorted(self.boundaries, -logprobs).astype(np.uint8)
        return codes

    def code_at(self, probability: float) -> int:
        """Returns the code of a probability above 0: the smallest code whose `lower_end` is at most the probability."""
        return int(np.searchsorted(self.boundaries, -np.log(probability)))

    def lower_end(self, code: int) -> float:
        """Returns the smallest probability that is encoded as `code`; 0 for the last code."""
        # The last code has no boundary after it: it also encodes all smaller probabilities.
        return float(np.exp(-np.float64(self.boundaries[code]))) if code < LEVELS - 1 else 0.0

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as JSON values."""
        return asdict(self)
