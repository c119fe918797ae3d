"""Reads figures of a layer: its size in bytes, and the fidelity that is stored in its commit records.

The commit record of a shard holds sums over the measured rows of the shard. Sums of several shards can be added, and a
mean is a sum divided by the number of measured rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from logitstore.errors import DamagedShardError, IdentityError, LayerNotFoundError
from logitstore.format.fidelity_sums import COUNTS
from logitstore.format.layout import layer_arrays

if TYPE_CHECKING:
    from collections.abc import Sequence

    from logitstore.store.reader import Store


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Fidelity sums of some shards of a layer."""

    shards: int
    """Number of shards whose commit records hold fidelity sums."""
    sums: dict[str, float]
    """Sums over the measured rows, by name (docs/fidelity.md)."""

    def means(self) -> dict[str, float]:
        """Returns the mean of each sum. Sums that are counts, such as `rows`, have no mean.

        Most sums are divided by the number of measured rows. `format.fidelity_sums.COUNTS` lists the exceptions.
        """
        found = {}
        for name, total in self.sums.items():
            count = COUNTS.get(name, "rows")
            if count and (num := self.sums.get(count, 0)):
                found[name] = total / num
        return found


def read_measured(store: Store, layer: str, shards: Sequence[int]) -> Measured:
    """Adds up the fidelity sums of some shards of a layer.

    Args:
        store: The open store.
        layer: Name of the layer.
        shards: Numbers of committed shards. Shards whose commit record is damaged, stale or missing are left
            out; `verify` reports them.
    """

    def of(shard: int) -> dict[str, float]:
        try:
            return store.reader.commit(layer, shard).fidelity
        except (DamagedShardError, IdentityError, LayerNotFoundError):
            return {}

    # Shards in which nothing was measured must not count as shards with a sum of 0.
    found = [values for values in store.storage.for_each(of, shards) if values]
    names = dict.fromkeys(name for values in found for name in values)
    sums = {name: math.fsum(values.get(name, 0.0) for values in found) for name in names}
    return Measured(shards=len(found), sums=sums)


def layer_bytes(store: Store, layer: str) -> dict[str, int]:
    """Returns the sizes in bytes of the arrays of a layer, by array name.

    The key "metadata" holds the total size of all other objects of the layer, so the sizes add up to the size of the
    layer. If the scheme is not `sample`, the array `draws` is left out, because it has no values.
    """
    target = store.stored.target
    has_draws = target is not None and target.scheme.name == "sample"
    arrays = [array.name for array in layer_arrays(layer) if array.name != "draws" or has_draws]
    sizes = {name: store.storage.num_bytes(f"{layer}/{name}") for name in arrays}
    return sizes | {"metadata": store.storage.num_bytes(layer) - sum(sizes.values())}


def spread_shards(store: Store, layer: str, most: int) -> list[int]:
    """Returns at most `most` committed shards of a layer, spread evenly over the store."""
    return evenly_spaced(store.layers[layer].index.upto(store.spec.num_shards).shards.tolist(), most)


def evenly_spaced(shards: Sequence[int], most: int) -> list[int]:
    """Returns at most `most` of the given shards, evenly spaced, including the first and the last."""
    places = np.unique(np.linspace(0, len(shards) - 1, min(most, len(shards))).astype(np.intp))
    return [shards[place] for place in places]
