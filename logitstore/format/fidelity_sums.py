"""Names and limits of the fidelity sums that commit records hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


TARGET_SUMS = frozenset({"rows", "mass", "kl_tail", "kl_renormalised", "kl_codes"})
TARGET_SOMETIMES = frozenset({"tv_draws", "control_rows", "control_kl", "control_tv"})
LOSSES_SUMS = frozenset({"rows", "alpha", "alpha_estimate", "alpha_error", "angle_row", "angle_shard", "shards"})
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
    needed, allowed = (TARGET_SUMS, TARGET_SUMS | TARGET_SOMETIMES) if layer == "target" else (LOSSES_SUMS, LOSSES_SUMS)
    if layer == "tokens" or not needed <= set(values) <= allowed:
        return False
    for name, value in values.items():
        # type, not isinstance: JSON's true is no number
        if type(value) not in (int, float) or not abs(value) <= LARGEST:
            return False
        if COUNTS.get(str(name)) == "" and not 0 <= value <= counted:
            return False
    return bool(values["rows"] > 0 and values.get("shards", 1) == 1)
