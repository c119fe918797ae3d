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
    """N distributions with a ragged number of entries each, E in all: truncated, or drawn from.

    Rows whose loss mask is 0 keep no entry, and their per-row numbers are NaN.
    """

    counts: NDArray[np.int64]
    """[N]: entries kept at each row."""
    token_ids: NDArray[np.uint32]
    """[E]: ids of the kept entries, rising within a row."""
    logprobs: NDArray[np.float32]
    """[E]: natural log of their probability, normalised over the whole vocabulary."""
    weights: NDArray[np.float32] | None
    """[E]: what each entry stands for where entries were drawn: with 0 for all others an unbiased estimate of p, which
    sums to 1 on average. None where rows are truncated: entries stand for themselves, and the tail for the rest."""
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
            weights=None if self.weights is None else self.weights[first:last],
            tail_mass=self.tail_mass[start:stop],
            label_logprob=self.label_logprob[start:stop],
            entropy=self.entropy[start:stop],
        )

    def padded(self, rows: NDArray[np.intp]) -> Padded:
        """Lays out the entries of some rows as a rectangle, as a device wants them.

        Args:
            rows: [M] row numbers.

        Returns:
            What is known of p, whatever the scheme, and the weights where entries were drawn.
        """
        counts = self.counts[rows]
        used = np.arange(int(counts.max(initial=1))) < counts[:, None]
        entries = (self.offsets[rows][:, None] + np.arange(used.shape[1]))[used]
        token_ids = np.zeros(used.shape, dtype=np.int64)
        token_ids[used] = self.token_ids[entries]
        probs = np.zeros(used.shape, dtype=np.float32)
        probs[used] = np.exp(self.logprobs[entries])
        tail = self.tail_mass[rows]
        if self.weights is None:
            return Padded(token_ids=token_ids, probs=probs, tail=tail)
        weights = np.zeros(used.shape, dtype=np.float32)
        weights[used] = self.weights[entries]
        return Padded(token_ids=token_ids, probs=probs, tail=tail, weights=weights, entropy=self.entropy[rows])

    @staticmethod
    def concatenate(parts: list[Rows]) -> Rows:
        """Joins rows in order, all of one scheme."""
        names = ["counts", "token_ids", "logprobs", "tail_mass", "label_logprob", "entropy"]
        is_drawn = bool(parts) and parts[0].weights is not None
        joined: dict[str, Any] = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in [*names, *(["weights"] if is_drawn else [])]
        }
        return Rows(**{"weights": None} | joined)


@dataclass(frozen=True, kw_only=True)
class Padded:
    """M rows as a rectangle, K the largest count among them, at least 1."""

    token_ids: NDArray[np.int64]
    """[M, K]; 0 beyond a row's count."""
    probs: NDArray[np.float32]
    """[M, K]: probabilities of the entries; 0 beyond a row's count."""
    tail: NDArray[np.float32]
    """[M]: what is left for all other tokens."""
    weights: NDArray[np.float32] | None = None
    """[M, K]: what entries stand for where they were drawn, 0 beyond a row's count; else None."""
    entropy: NDArray[np.float32] | None = None
    """[M]: of the whole distribution, where entries were drawn; else None."""
