"""Starts, sizes and replaces the Ray actors of a dump."""

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

PROGRESS = "progress"
"""Name of the Ray concurrency group for calls to `ShardDumper.progress`. The group has a thread of its own, so that an
actor answers these calls even while its other threads are busy."""


class Pool:
    """A fixed number of slots, with one actor in each. If an actor dies, a new actor can be started in its slot.

    Ray starts an actor when a node has room for it, and the actor then loads its models. Both steps may take long, or
    never end. No shard may be handed to an actor before both steps are done.
    """

    def __init__(self, storage: Storage, plan: DumpPlan) -> None:
        """Starts an actor in every slot. Does not wait until the actors are ready."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        num, cpus, gpus = size(nodes, plan)
        if num > (most := room(nodes, cpus, gpus)):
            logger.warning(
                "%d actors with %g CPUs and %g GPUs each were requested, but the cluster has room for %d; waiting for "
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
            # By default, Ray limits a worker to one OpenMP thread, even if the worker has reserved several CPUs.
            "num_threads": None if gpus else max(1, int(cpus)),
        }
        self.actors: list[Any] = [None] * num
        """The actor in each slot; None in a slot that was given up."""
        self.starting: dict[Any, int] = {}
        """Place of each actor that is starting. The key is a Ray object reference: it becomes ready when the start
        ends, and `ray.get` raises if the start failed."""
        for slot in range(num):
            self._start(slot)

    def _start(self, slot: int) -> None:
        # Ray must not retry calls by itself, because only the dispatcher counts attempts and knows what is committed.
        kind: Any = ray.remote(concurrency_groups={PROGRESS: 1})  # type: ignore[call-overload]  # missing in its types
        actor: Any = kind(ShardDumper).options(**self._options).remote(**self._arguments)
        self.actors[slot] = actor
        self.starting[actor.__ray_ready__.remote()] = slot

    def replace(self, slot: int) -> None:
        """Ends the actor in a slot and starts a new one there."""
        ray.kill(self.actors[slot])  # An actor that is alive but out of reach would keep its GPU.
        self._start(slot)

    def give_up(self, slot: int) -> None:
        """Ends the actor in a slot. The slot then stays empty."""
        ray.kill(self.actors[slot])
        self.actors[slot] = None

    def stop(self) -> None:
        """Ends all actors."""
        for actor in self.actors:
            if actor is not None:
                ray.kill(actor)


def size(nodes: Sequence[Mapping[str, float]], plan: DumpPlan) -> tuple[int, float, float]:
    """Chooses the number of actors, and the CPUs and GPUs of each, so that all actors fit on the nodes.

    Args:
        nodes: For each node, its number of CPUs under the key "CPU" and its number of GPUs under the key "GPU".
        plan: The plan. If the plan gives the number of actors, or the CPUs or GPUs of each, the given number is used
            even if the actors then do not fit on the nodes. The exception is a fraction of a GPU, which is rounded up
            to 1, 1/2, 1/3, ...: for example, 0.6 becomes a whole GPU.

    Returns:
        The number of actors, the CPUs of each actor, and the GPUs of each actor.
    """
    gpus = plan.gpus_per_actor
    if gpus is None:
        gpus = float(any(node.get("GPU", 0) >= 1 for node in nodes))
    if 0 < gpus < 1:
        # Ray adds up the free parts of a node's GPUs. If two GPUs of a node have 0.4 left each, Ray would choose this
        # node for an actor that needs 0.6, and the actor would wait forever.
        gpus = 1 / times(gpus, 1)
    if gpus:
        cpus = plan.cpus_per_actor or 1.0
        return plan.num_actors or max(1, room(nodes, cpus, gpus)), cpus, gpus
    num = plan.num_actors or 1
    # Each actor gets the most CPUs with which all actors fit, or 1 if they never fit together.
    largest = int(max(node.get("CPU", 0) for node in nodes))
    shares = (float(cpus) for cpus in range(largest, 0, -1) if room(nodes, cpus, 0) >= num)
    return num, plan.cpus_per_actor or next(shares, 1.0), gpus
