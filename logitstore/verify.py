"""Is a store intact? Reads every committed byte once and compares it with its commit."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from logitstore.errors import DamagedShardError, FormatError, IdentityError, LayerNotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable

    from logitstore.reader import Store


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One damaged or stale shard of a layer."""

    layer: str
    shard: int
    reason: str


def verify(store: Store, *, num_threads: int = 4, progress: Callable[[int], object] | None = None) -> list[Problem]:
    """Reads every committed shard of every layer and lists those that are not as committed.

    Args:
        store: What to check, as it was when it was opened.
        num_threads: Shards read at once.
        progress: Called after each shard of a layer with 1, for a progress bar.

    Returns:
        The problems, by layer and shard; empty for an intact store. Shards not committed yet are none.
    """

    def check(place: tuple[str, int]) -> Problem | None:
        layer, shard = place
        try:
            if layer == "target":
                store.read_shard(shard, layers=("tokens", "target"))
            else:
                store.read_arrays(layer, shard)
        except (DamagedShardError, FormatError, IdentityError, LayerNotFoundError) as error:
            if isinstance(error, DamagedShardError) and error.layer != layer:
                return None  # found where it is
            reason = error.reason if isinstance(error, DamagedShardError) else str(error)
            return Problem(layer=layer, shard=shard, reason=reason)
        finally:
            if progress is not None:
                progress(1)
        return None

    with ThreadPoolExecutor(num_threads) as pool:
        return [problem for problem in pool.map(check, places(store)) if problem is not None]


def places(store: Store) -> list[tuple[str, int]]:
    """Lists the (layer, shard) pairs that `verify` reads: those of the shards that readers see."""
    return [
        (name, shard)
        for name, layer in store.layers.items()
        for shard in sorted(layer.committed)
        if shard < store.num_shards
    ]
