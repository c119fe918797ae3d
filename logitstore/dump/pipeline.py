"""Ray actors over the shards that are missing. The only file of the package that imports ray."""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from tqdm import tqdm

from logitstore.dump.worker import ModelSource, ShardDumper
from logitstore.layout import losses_layer
from logitstore.reader import Store

if TYPE_CHECKING:
    from logitstore.storage import Storage

logger = logging.getLogger(__name__)

SHARDS_IN_FLIGHT = 2
"""Per actor: one on the device, one being encoded and written."""
MAX_ATTEMPTS = 3
"""How often a shard is tried before it is set aside."""


@dataclass(frozen=True, kw_only=True)
class DumpPlan:
    """What is to be computed, with what."""

    target: ModelSource | None
    references: dict[str, ModelSource]
    num_actors: int | None = None
    """None: one for each GPU of the cluster, or one on a cluster without GPUs."""
    gpus_per_actor: float | None = None
    """Share of a GPU that each actor holds. None: 1 where the cluster has GPUs, else 0."""
    cpus_per_actor: float | None = None
    """None: 1 beside a GPU, else the cluster's CPUs over the actors."""
    batch_tokens: int = 16384
    """Most tokens of a forward, padding included."""


@dataclass(kw_only=True)
class DumpReport:
    """How a dump went."""

    rows: int = 0
    """Rows written, prompt rows included."""
    entries: int = 0
    """Entries written."""
    seconds: float = 0.0
    """From the first shard handed out to the last one committed, loading of the models included."""
    shards_done: int = 0
    shards_skipped: int = 0
    """Shards that needed nothing."""
    failed: dict[int, str] = field(default_factory=dict)
    """Why each shard that was set aside failed last."""


class _Pool:
    """A fixed number of actors; a dead one is replaced."""

    def __init__(self, storage: Storage, plan: DumpPlan) -> None:
        resources = ray.cluster_resources()
        cluster_gpus, cluster_cpus = int(resources.get("GPU", 0)), resources.get("CPU", 1.0)
        gpus = plan.gpus_per_actor if plan.gpus_per_actor is not None else float(cluster_gpus > 0)
        self.size = plan.num_actors or (max(1, int(cluster_gpus / gpus)) if gpus else 1)
        cpus = plan.cpus_per_actor or (1.0 if gpus else max(1.0, cluster_cpus // self.size))
        if self.size * gpus > cluster_gpus or self.size * cpus > cluster_cpus:
            logger.warning(
                "%d actors of %g CPUs and %g GPUs are wanted where the cluster has %g and %d; waiting for it to grow",
                self.size, cpus, gpus, cluster_cpus, cluster_gpus,
            )  # fmt: skip
        self._options = {"num_cpus": cpus, "num_gpus": gpus, "max_concurrency": SHARDS_IN_FLIGHT}
        self._arguments = {
            "storage": storage,
            "target": plan.target,
            "references": plan.references,
            "batch_tokens": plan.batch_tokens,
            "device": "cuda" if gpus else "cpu",
            # Ray gives its workers one OpenMP thread whatever they reserved.
            "num_threads": None if gpus else max(1, int(cpus)),
        }
        self.actors = [self._start() for _ in range(self.size)]

    def _start(self) -> Any:  # noqa: ANN401
        # No retries by Ray itself: the loop below knows which shards are committed and counts attempts.
        return ray.remote(ShardDumper).options(**self._options).remote(**self._arguments)

    def replace(self, actor: Any) -> None:  # noqa: ANN401
        ray.kill(actor)
        self.actors[self.actors.index(actor)] = self._start()


def run_dump(storage: Storage, plan: DumpPlan, *, progress: bool = True) -> DumpReport:
    """Fills the missing shards of the plan's layers. Needs a Ray that was initialised.

    Shards that are committed are skipped. A shard whose actor dies or that raises is tried again, on a fresh actor,
    up to MAX_ATTEMPTS times, and then set aside; the others are finished.

    Args:
        storage: A store with tokens and with the layers created.
        plan: What to compute.
        progress: Whether to show a bar of rows on stderr.

    Returns:
        What was written; `failed` is empty if everything was.

    Raises:
        RuntimeError: No actor lives long enough to finish a single shard.
    """
    store = Store(storage)
    todo = missing_layers(store, plan)
    report = DumpReport(shards_skipped=store.num_shards - len(todo))
    if not todo:
        return report
    pool = _Pool(storage, plan)
    attempts = dict.fromkeys(todo, 0)
    queue = list(todo)
    running: dict[Any, tuple[Any, int]] = {}
    deaths = 0
    started = time.monotonic()
    bar = tqdm(
        total=sum(store.commit("tokens", shard).rows for shard in todo),
        desc="dump", unit="row", unit_scale=True, smoothing=0.1, disable=not progress,
        mininterval=0.5 if sys.stderr.isatty() else 10,
    )  # fmt: skip
    with bar:
        while queue or running:
            for actor in pool.actors:
                while queue and sum(a is actor for a, _ in running.values()) < SHARDS_IN_FLIGHT:
                    shard = queue.pop(0)
                    running[actor.dump.remote(shard, todo[shard])] = (actor, shard)
            done, _ = ray.wait(list(running), num_returns=1)
            actor, shard = running.pop(done[0])
            try:
                commits = ray.get(done[0])
            except (ActorDiedError, ActorUnavailableError) as error:
                deaths += 1
                if actor in pool.actors:
                    if report.shards_done == 0 and deaths > MAX_ATTEMPTS * pool.size:
                        raise RuntimeError(
                            f"actors must live to finish a shard, got {deaths} deaths before the first: {error}; "
                            "see the workers' logs; --batch_tokens and --num_actors decide the memory used"
                        ) from error
                    pool.replace(actor)
                reason = f"its actor died ({_brief(error)})"
            except RayTaskError as error:
                reason = _brief(error.cause if isinstance(error.cause, Exception) else error)
            else:
                report.shards_done += 1
                report.rows += commits[0].rows
                report.entries += sum(commit.entries for commit in commits)
                bar.update(commits[0].rows)
                continue
            attempts[shard] += 1
            if attempts[shard] < MAX_ATTEMPTS:
                logger.warning("shard %d is tried again: %s", shard, reason)
                queue.append(shard)
            else:
                logger.error("shard %d is set aside after %d attempts: %s", shard, attempts[shard], reason)
                report.failed[shard] = reason
    report.seconds = time.monotonic() - started
    for actor in pool.actors:
        ray.kill(actor)
    return report


def missing_layers(store: Store, plan: DumpPlan) -> dict[int, tuple[str, ...]]:
    """Returns which layers of which shards the plan still has to compute."""
    layers = [*(["target"] if plan.target else []), *(losses_layer(name) for name in plan.references)]
    missing = {
        shard: tuple(layer for layer in layers if shard not in store.layers[layer].committed)
        for shard in range(store.num_shards)
    }
    return {shard: wanted for shard, wanted in missing.items() if wanted}


def _brief(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
