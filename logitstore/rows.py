"""Rows: the target's next-token distributions in memory, the currency between every part. NumPy only.

N rows, E entries. Row i holds the distribution of token i + 1 given tokens 0..i of the same document.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def row_sums(values: NDArray[np.float32], counts: NDArray[np.int64]) -> NDArray[np.float32]:
    """Sums runs of `values`: the first counts[0] of them, the next counts[1], and so on.

    Args:
        values: Float32 [E].
        counts: Int64 [N], each at least 1, summing to E.

    Returns:
        Float32 [N].
    """
    if not len(counts):
        return np.zeros(0, dtype=np.float32)
    return np.add.reduceat(values, np.cumsum(counts) - counts)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """N truncated distributions with a ragged number of entries each, E in all.

    Rows whose loss mask is 0 keep no entry, and their per-row numbers are NaN.
    """

    counts: NDArray[np.int64]
    """[N]: entries kept at each row."""
    token_ids: NDArray[np.uint32]
    """[E]: ids of the kept entries, by falling probability within a row."""
    logprobs: NDArray[np.float32]
    """[E]: natural log of their probability, normalised over the whole vocabulary."""
    tail_mass: NDArray[np.float32]
    """[N]: 1 minus the sum of the kept probabilities, in [0, 1]."""
    label_logprob: NDArray[np.float32]
    """[N]: logprob of the token that really follows, kept or not."""
    entropy: NDArray[np.float32]
    """[N]: entropy of the whole distribution, nats."""

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """[N + 1]: the entries of row i are offsets[i]..offsets[i + 1]."""
        offsets = np.zeros(len(self.counts) + 1, dtype=np.int64)
        np.cumsum(self.counts, out=offsets[1:])
        return offsets

    def __len__(self) -> int:
        return len(self.counts)

    def slice(self, start: int, stop: int) -> Rows:
        """Returns rows start..stop; views, no copies."""
        first, last = int(self.offsets[start]), int(self.offsets[stop])
        return Rows(
            counts=self.counts[start:stop],
            token_ids=self.token_ids[first:last],
            logprobs=self.logprobs[first:last],
            tail_mass=self.tail_mass[start:stop],
            label_logprob=self.label_logprob[start:stop],
            entropy=self.entropy[start:stop],
        )

    def padded(self, rows: NDArray[np.intp]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Lays out the entries of some rows as a rectangle, as a device wants them.

        Args:
            rows: [M] row numbers.

        Returns:
            Token ids and probabilities, [M, K] with K the largest count among them (at least 1); beyond a row's
            count the id is 0 and the probability is 0.
        """
        counts = self.counts[rows]
        width = int(counts.max(initial=1))
        used = np.arange(width) < counts[:, None]
        entries = (self.offsets[rows][:, None] + np.arange(width))[used]
        token_ids = np.zeros(used.shape, dtype=np.int64)
        probs = np.zeros(used.shape, dtype=np.float32)
        token_ids[used] = self.token_ids[entries]
        probs[used] = np.exp(self.logprobs[entries])
        return token_ids, probs

    @staticmethod
    def concatenate(parts: list[Rows]) -> Rows:
        """Joins rows in order."""
        names = ("counts", "token_ids", "logprobs", "tail_mass", "label_logprob", "entropy")
        joined: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        return Rows(**joined)
