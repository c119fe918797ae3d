"""Names and limits of the fidelity sums in commit records. docs/fidelity.md gives the formula of each sum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


TARGET_SUMS = frozenset({"rows", "mass", "kl_tail", "kl_renormalised", "kl_codes"})
"""Sums that a commit record of the `target` layer always has if the fidelity of its shard was measured."""
TARGET_SOMETIMES = frozenset({"tv_draws", "control_rows", "control_kl", "control_tv"})
"""Further sums that a commit record of the `target` layer may have if the fidelity of its shard was measured."""
LOSSES_SUMS = frozenset({"rows", "alpha", "alpha_estimate", "alpha_error", "angle_row", "angle_shard", "shards"})
"""Sums that a commit record of a `losses/<name>` layer always has if the fidelity of its shard was measured."""
COUNTS = {
    "control_kl": "control_rows",
    "control_tv": "control_rows",
    "angle_shard": "shards",
    "control_rows": "",
    "rows": "",
    "shards": "",
}
"""Divisors of the sums: maps the name of a sum to the name of a count. The sum divided by the count is a mean. Sums
that are not listed here are divided by "rows". A sum that is itself a count is not divided, and maps to ""."""
LARGEST = 1e12
"""Maximum absolute value of a sum. With this limit, the totals that readers compute over all shards are finite."""


def is_measured(layer: str, values: Mapping[Any, Any], counted: int) -> bool:
    """Returns whether the fidelity sums of a commit record have the expected names and possible values.

    Args:
        layer: Layer of the record.
        values: The sums by name, as parsed from JSON. Empty if nothing was measured; empty sums are always valid.
        counted: Number of rows in the shard whose loss mask is 1.
    """
    if not values:
        return True
    # The fidelity of tokens is never measured, because tokens are stored exactly.
    needed, allowed = (TARGET_SUMS, TARGET_SUMS | TARGET_SOMETIMES) if layer == "target" else (LOSSES_SUMS, LOSSES_SUMS)
    if layer == "tokens" or not needed <= set(values) <= allowed:
        return False
    for name, value in values.items():
        # isinstance would accept JSON's true, because bool is a subclass of int. NaN fails the comparison.
        if type(value) not in (int, float) or not abs(value) <= LARGEST:
            return False
        # Fidelity is measured only at rows whose loss mask is 1, so no count exceeds the number of these rows.
        if COUNTS.get(str(name)) == "" and not 0 <= value <= counted:
            return False
    # The record describes one shard, so its own count of shards is 1.
    return bool(values["rows"] > 0 and values.get("shards", 1) == 1)
