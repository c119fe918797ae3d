"""How many workers of a given size a Ray cluster has room for."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def room(nodes: Sequence[Mapping[str, float]], cpus: float, gpus: float) -> int:
    """Counts the actors that nodes can hold while nothing else runs there: each is on one node.

    Args:
        nodes: What each node has of "CPU" and "GPU".
        cpus: Of an actor, above 0.
        gpus: Of an actor. A share is one of a single GPU.
    """
    num = 0
    for node in nodes:
        here = times(cpus, node.get("CPU", 0))
        if gpus:
            num_gpus = int(node.get("GPU", 0))
            here = min(here, num_gpus * times(gpus, 1) if gpus <= 1 else times(gpus, num_gpus))
        num += here
    return num


def times(part: float, whole: float) -> int:
    """Returns how often `part` fits into `whole`."""
    return int(whole / part + 1e-6)  # 0.3 is three times 0.1, whatever floats say
