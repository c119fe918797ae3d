"""What commit records say of a layer's fidelity: names, checks and sums. Measuring is `logitstore.dump.fidelity`.

Every number is a sum over the rows of a shard that were measured, so that sums of shards add up, and means are sums
divided by how many rows there are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from logitstore.errors import DamagedShardError, IdentityError, LayerNotFoundError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from logitstore.reader import Store

TARGET = frozenset({"rows", "mass", "kl_tail", "kl_renormalised", "kl_codes"})
TARGET_SOMETIMES = frozenset({"tv_draws", "control_rows", "control_kl", "control_tv"})
LOSSES = frozenset({"rows", "alpha", "alpha_estimate", "alpha_error", "angle_row", "angle_shard", "shards"})
"""Names of the sums, by layer (docs/fidelity.md)."""

COUNTS = {
    "control_kl": "control_rows",
    "control_tv": "control_rows",
    "angle_shard": "shards",
    "control_rows": "",
    "rows": "",
    "shards": "",
}
"""What a sum is divided by for its mean, where that is not rows; "" of what counts itself."""

LARGEST = 1e12
"""No sum is larger: what is read is added up."""


def is_measured(layer: str, values: Mapping[Any, Any], counted: int) -> bool:
    """Returns whether values can be what was measured of a shard with so many rows that count; nothing always can."""
    if not values:
        return True
    needed, allowed = (TARGET, TARGET | TARGET_SOMETIMES) if layer == "target" else (LOSSES, LOSSES)
    if layer == "tokens" or not needed <= set(values) <= allowed:
        return False
    for name, value in values.items():
        # type, not isinstance: JSON's true is no number
        if type(value) not in (int, float) or not abs(value) <= LARGEST:
            return False
        if COUNTS.get(str(name)) == "" and not 0 <= value <= counted:
            return False
    return bool(values["rows"] > 0 and values.get("shards", 1) == 1)


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


def read(store: Store, layer: str, shards: Sequence[int]) -> Measured:
    """Adds up what was measured of some shards of a layer, from their commit records.

    Args:
        store: An opened store.
        layer: Which.
        shards: Committed ones. Those whose record is of no use (damaged, stale, taken back) are left out: `verify`
            tells of them.
    """

    def of(shard: int) -> dict[str, float]:
        try:
            return store.commit(layer, shard).fidelity
        except (DamagedShardError, IdentityError, LayerNotFoundError):
            return {}

    found = [values for values in store.storage.for_each(of, shards) if values]
    names = dict.fromkeys(name for values in found for name in values)
    sums = {name: math.fsum(values.get(name, 0.0) for values in found) for name in names}
    return Measured(shards=len(found), sums=sums)


def spread(store: Store, layer: str, most: int) -> list[int]:
    """Returns at most so many committed shards of a layer, evenly over the store."""
    return evenly(store.layers[layer].index.upto(store.spec.num_shards).shards.tolist(), most)


def evenly(shards: Sequence[int], most: int) -> list[int]:
    """Returns at most so many of some shards, the first and the last among them."""
    places = np.unique(np.linspace(0, len(shards) - 1, min(most, len(shards))).astype(np.intp))
    return [shards[place] for place in places]
