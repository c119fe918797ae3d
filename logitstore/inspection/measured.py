"""Adds up what commit records say of the fidelity of a layer.

Every number is a sum over the rows of a shard that were measured, so that sums of shards add up, and means are sums
divided by how many rows there are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from logitstore.errors import DamagedShardError, IdentityError, LayerNotFoundError
from logitstore.format.fidelity_sums import COUNTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from logitstore.store.reader import Store


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured of a layer."""

    shards: int
    """Shards in whose records it stands."""
    sums: dict[str, float]
    """By name."""

    def means(self) -> dict[str, float]:
        """Returns the mean of each name that is no count: per row, or per shard for angle_shard."""
        found = {}
        for name, total in self.sums.items():
            count = COUNTS.get(name, "rows")
            if count and (num := self.sums.get(count, 0)):
                found[name] = total / num
        return found


def read_measured(store: Store, layer: str, shards: Sequence[int]) -> Measured:
    """Adds up what was measured of some shards of a layer, from their commit records.

    Args:
        store: An opened store.
        layer: Which.
        shards: Committed ones. Those whose record is of no use (damaged, stale, taken back) are left out: `verify`
            tells of them.
    """

    def of(shard: int) -> dict[str, float]:
        try:
            return store.reader.commit(layer, shard).fidelity
        except (DamagedShardError, IdentityError, LayerNotFoundError):
            return {}

    found = [values for values in store.storage.for_each(of, shards) if values]
    names = dict.fromkeys(name for values in found for name in values)
    sums = {name: math.fsum(values.get(name, 0.0) for values in found) for name in names}
    return Measured(shards=len(found), sums=sums)


def spread_shards(store: Store, layer: str, most: int) -> list[int]:
    """Returns at most so many committed shards of a layer, evenly over the store."""
    return evenly_spaced(store.layers[layer].index.upto(store.spec.num_shards).shards.tolist(), most)


def evenly_spaced(shards: Sequence[int], most: int) -> list[int]:
    """Returns at most so many of some shards, the first and the last among them."""
    places = np.unique(np.linspace(0, len(shards) - 1, min(most, len(shards))).astype(np.intp))
    return [shards[place] for place in places]
