"""The actors of a dump: how many there are and how large, and who takes a dead one's place."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import ray

from logitstore.cluster.resources import room, times
from logitstore.dump.schedule import SHARDS_IN_FLIGHT
from logitstore.dump.worker import ShardDumper

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from logitstore.dump.plan import DumpPlan
    from logitstore.storage.storage import Storage

logger = logging.getLogger(__name__)


class Pool:
    """A fixed number of places for actors; a dead one is replaced.

    An actor starts when a node has room for it, and has started once its models are loaded. Either may take long, or
    never happen: nothing is to be handed to an actor before.
    """

    def __init__(self, storage: Storage, plan: DumpPlan) -> None:
        """Begins to start an actor at every place."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        num, cpus, gpus = size(nodes, plan)
        if num > (most := room(nodes, cpus, gpus)):
            logger.warning(
                "%d actors of %g CPUs and %g GPUs are wanted where the cluster's nodes have room for %d; waiting for "
                "it to grow", num, cpus, gpus, most,
            )  # fmt: skip
        self._options = {"num_cpus": cpus, "num_gpus": gpus, "max_concurrency": SHARDS_IN_FLIGHT}
        self._arguments = {
            "storage": storage,
            "target": plan.target,
            "references": plan.references,
            "made_by": plan.made_by,
            "batch_tokens": plan.batch_tokens,
            "max_kl": plan.max_kl,
            "device": "cuda" if gpus else "cpu",
            # Ray gives its workers one OpenMP thread whatever they reserved.
            "num_threads": None if gpus else max(1, int(cpus)),
        }
        self.actors: list[Any] = [None] * num
        """By place; None where there will be no more."""
        self.starting: dict[Any, int] = {}
        """Places whose actor is starting, by what is there, or fails, when that is over."""
        for place in range(num):
            self._start(place)

    def _start(self, place: int) -> None:
        # No retries by Ray itself: the dump's loop knows which shards are committed and counts attempts.
        actor: Any = ray.remote(ShardDumper).options(**self._options).remote(**self._arguments)
        self.actors[place] = actor
        self.starting[actor.__ray_ready__.remote()] = place

    def replace(self, place: int) -> None:
        """Starts another actor at a place."""
        ray.kill(self.actors[place])  # one that only could not be reached would go on holding its GPU
        self._start(place)

    def give_up(self, place: int) -> None:
        """Leaves a place without an actor."""
        ray.kill(self.actors[place])
        self.actors[place] = None

    def stop(self) -> None:
        """Ends all actors."""
        for actor in self.actors:
            if actor is not None:
                ray.kill(actor)


def size(nodes: Sequence[Mapping[str, float]], plan: DumpPlan) -> tuple[int, float, float]:
    """Chooses what the plan leaves open, so that all actors fit.

    Args:
        nodes: What each node has of "CPU" and "GPU".
        plan: What is given is taken, whether it fits or not. But a share of a GPU becomes an even one: 0.6 a whole GPU.

    Returns:
        How many actors, and the CPUs and the GPUs of each.
    """
    gpus = plan.gpus_per_actor
    if gpus is None:
        gpus = float(any(node.get("GPU", 0) >= 1 for node in nodes))
    if 0 < gpus < 1:
        # Ray sends actors to nodes by the sum of their GPUs: where two have 0.4 left, one of 0.6 would wait for ever.
        gpus = 1 / times(gpus, 1)
    if gpus:
        cpus = plan.cpus_per_actor or 1.0
        return plan.num_actors or max(1, room(nodes, cpus, gpus)), cpus, gpus
    num = plan.num_actors or 1
    largest = int(max(node.get("CPU", 0) for node in nodes))
    shares = (float(cpus) for cpus in range(largest, 0, -1) if room(nodes, cpus, 0) >= num)
    return num, plan.cpus_per_actor or next(shares, 1.0), gpus
