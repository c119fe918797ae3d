"""Rows: the in-memory form of the target's next-token distributions, used by all parts of the code. NumPy only.

In shapes, N is the number of rows and E the number of entries. Row i holds the distribution of token i + 1 given tokens
0..i of the same document.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def row_sums(values: NDArray[np.float32], counts: NDArray[np.int64]) -> NDArray[np.float32]:
    """Sums the entries of each row: the first counts[0] values, the next counts[1] values, and so on.

    Args:
        values: Float32 [E]: one value per entry.
        counts: Int64 [N]: number of entries of each row, at least 1; they sum to E.

    Returns:
        Float32 [N]: the sum of each row.
    """
    if not len(counts):
        return np.zeros(0, dtype=np.float32)
    return np.add.reduceat(values, np.cumsum(counts) - counts)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """N next-token distributions with E entries in all. Each distribution has its own number of entries.

    The entries of a distribution are either its likeliest tokens (truncation) or tokens drawn from it. Rows whose loss
    mask is 0 have no entries, and their tail mass, label logprob and entropy are NaN.
    """

    counts: NDArray[np.int64]
    """[N]: number of entries of each row."""
    token_ids: NDArray[np.uint32]
    """[E]: token ids of the entries, strictly rising within a row."""
    logprobs: NDArray[np.float32]
    """[E]: natural log of each entry's probability, normalised over the whole vocabulary."""
    weights: NDArray[np.float32] | None
    """[E]: weight of each entry, if entries were drawn. Tokens without an entry have weight 0. The weights of a row are
    an unbiased estimate of the target's probabilities, and sum to 1 on average. None if the rows were truncated: the
    weight of an entry is then its probability, and the tail mass is the weight of all other tokens together."""
    tail_mass: NDArray[np.float32]
    """[N]: 1 minus the sum of the kept probabilities, in [0, 1]."""
    label_logprob: NDArray[np.float32]
    """[N]: logprob of the token that follows the row in its document, whether this token has an entry or not."""
    entropy: NDArray[np.float32]
    """[N]: entropy of the whole distribution, in nats."""

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """Int64 [N + 1]: row i has the entries offsets[i] up to, not including, offsets[i + 1]."""
        offsets = np.zeros(len(self.counts) + 1, dtype=np.int64)
        np.cumsum(self.counts, out=offsets[1:])
        return offsets

    def __len__(self) -> int:
        return len(self.counts)

    def slice(self, start: int, stop: int) -> Rows:
        """Returns the rows from `start` up to, not including, `stop`. The returned arrays are views, not copies."""
        # Entries of consecutive rows are stored side by side, so one range holds all of them.
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
        """Lays out the entries of some rows as padded rectangular arrays, for computation on a GPU.

        Args:
            rows: [M]: indices of the rows.

        Returns:
            The M rows. Token ids, probabilities and tail mass are always set. Weights and entropy are set only if the
            entries were drawn.
        """
        counts = self.counts[rows]
        # `initial=1` makes at least one column, even if no row has entries.
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
        """Joins several objects of this class into one, in order.

        Args:
            parts: Rows to join, at least one element. All elements must come from the same scheme.
        """
        # Offsets are left out, because `offsets` computes them from the counts.
        names = ["counts", "token_ids", "logprobs", "tail_mass", "label_logprob", "entropy"]
        is_drawn = bool(parts) and parts[0].weights is not None
        joined: dict[str, Any] = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in [*names, *(["weights"] if is_drawn else [])]
        }
        return Rows(**{"weights": None} | joined)


@dataclass(frozen=True, kw_only=True)
class Padded:
    """M rows as padded arrays of K columns. K is the number of entries of the longest row, but at least 1."""

    token_ids: NDArray[np.int64]
    """[M, K]: token ids of the entries; 0 beyond a row's last entry."""
    probs: NDArray[np.float32]
    """[M, K]: probabilities of the entries; 0 beyond a row's last entry."""
    tail: NDArray[np.float32]
    """[M]: tail mass, the total probability of all tokens without an entry."""
    weights: NDArray[np.float32] | None = None
    """[M, K]: weights of the entries, 0 beyond a row's last entry; None if the rows were truncated."""
    entropy: NDArray[np.float32] | None = None
    """[M]: entropy of the whole distribution in nats; None if the rows were truncated."""
