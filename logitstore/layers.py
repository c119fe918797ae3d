"""A layer of an opened store: its spec, and which of its shards are there."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Collection

    from logitstore.commits import Index
    from logitstore.spec import LossSpec, StoreSpec, TargetSpec


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What one stage added."""

    name: str
    spec: StoreSpec | TargetSpec | LossSpec
    made_by: str
    """Digest of the spec's identity."""
    index: Index
    """Shards that are there."""
    num_shards: int
    """Shards that there will be."""
    stale: frozenset[int]
    """Shards computed from other values than the layer below has now. No use to anybody; the dump replaces them."""

    @property
    def committed(self) -> frozenset[int]:
        """Shards that are there, stale ones too."""
        return self.index.committed

    @property
    def gaps(self) -> list[range]:
        """Runs of shards not committed yet, in order. A store may say that it will have millions: they cost nothing."""
        edges = np.concatenate([[-1], self.index.upto(self.num_shards).shards, [self.num_shards]])
        (before,) = np.nonzero(np.diff(edges) > 1)
        return [range(a + 1, b) for a, b in zip(edges[before].tolist(), edges[before + 1].tolist(), strict=True)]

    @property
    def num_missing(self) -> int:
        """How many shards are not committed yet."""
        return sum(map(len, self.gaps))

    @cached_property
    def missing(self) -> list[int]:
        """Shards not committed yet, in order, for whoever is to write them."""
        return list(itertools.chain.from_iterable(self.gaps))


def stale(index: Index, below: Index) -> frozenset[int]:
    """Finds the shards that were computed from other values than the layer below has now."""
    common, places, places_below = np.intersect1d(index.shards, below.shards, assume_unique=True, return_indices=True)
    others = frozenset(common[index.origins[places] != below.digests[places_below]].tolist())
    return others - index.contested - below.contested


def runs(shards: Collection[int]) -> list[range]:
    """Returns shard numbers as runs, in order."""
    numbers = sorted(shards)
    starts = [i for i, shard in enumerate(numbers) if i == 0 or shard != numbers[i - 1] + 1]
    return [range(numbers[start], numbers[stop - 1] + 1) for start, stop in itertools.pairwise([*starts, len(numbers)])]


def spans(shards: list[range], most: int = 10) -> str:
    """Writes runs of shards as people do: 1, 4-6, 9, and how many more where there are many."""
    texts = [str(run.start) if len(run) == 1 else f"{run.start}-{run.stop - 1}" for run in shards[:most]]
    more = f" and {sum(map(len, shards[most:])):,} more" if len(shards) > most else ""
    return ", ".join(texts) + more
