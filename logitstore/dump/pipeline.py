"""Ray actors over the shards that are missing. The only file of the package that imports ray."""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, OutOfMemoryError, RayTaskError
from tqdm import tqdm

from logitstore.commits import committed_shards
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


class DumpError(RuntimeError):
    """Nothing can be computed: the dump stops at once. What is committed stays."""


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
        ray.kill(actor)  # one that only could not be reached would go on holding its GPU
        self.actors = [self._start() if member is actor else member for member in self.actors]

    def stop(self) -> None:
        for actor in self.actors:
            ray.kill(actor)


class _Run:
    """The loop over shards: hand out, wait, settle."""

    def __init__(
        self, store: Store, storage: Storage, pool: _Pool, todo: dict[int, tuple[str, ...]], bar: tqdm[Any]
    ) -> None:
        self.store = store
        self.storage = storage
        self.pool = pool
        self.todo = todo
        self.report = DumpReport(shards_skipped=store.num_shards - len(todo))
        self.bar = bar
        self.queue = list(todo)
        self.running: dict[Any, tuple[Any, int]] = {}
        self.attempts = dict.fromkeys(todo, 0)
        self.deaths = 0

    def loop(self) -> None:
        while self.queue or self.running:
            # A first shard for every actor before a second for any.
            for depth in range(1, SHARDS_IN_FLIGHT + 1):
                for actor in self.pool.actors:
                    if self.queue and sum(busy is actor for busy, _ in self.running.values()) < depth:
                        shard = self.queue.pop(0)
                        self.running[actor.dump.remote(shard, self.todo[shard])] = (actor, shard)
            done, _ = ray.wait(list(self.running), num_returns=1)
            self.settle(done[0], *self.running.pop(done[0]))

    def settle(self, result: Any, actor: Any, shard: int) -> None:  # noqa: ANN401
        try:
            commits = ray.get(result)
        except (ActorDiedError, ActorUnavailableError, OutOfMemoryError) as error:
            if isinstance(error, ActorDiedError) and error.actor_init_failed:
                raise DumpError(f"models must load on an actor, got {_last_line(error)}") from error
            self.bury(actor, error)
            self.fail(shard, f"its actor died ({_first_line(error)})", again=True)
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            # Wrong numbers stay wrong; anything else (a bucket, a device) may pass.
            self.fail(shard, f"{type(cause).__name__}: {_first_line(cause)}", again=not isinstance(cause, ValueError))
        else:
            self.finish(shard, sum(commit.entries for commit in commits))

    def finish(self, shard: int, entries: int) -> None:
        rows = self.store.commit("tokens", shard).rows
        self.report.shards_done += 1
        self.report.rows += rows
        self.report.entries += entries
        self.bar.update(rows)

    def bury(self, actor: Any, error: Exception) -> None:  # noqa: ANN401
        """Replaces a dead actor, once, however many of its shards come back."""
        if not any(actor is member for member in self.pool.actors):
            return
        self.deaths += 1
        if self.report.shards_done == 0 and self.deaths >= MAX_ATTEMPTS:
            raise DumpError(
                f"actors must live to finish a shard, got {self.deaths} deaths before the first "
                f"({_first_line(error)}); too little memory is the usual cause: give a smaller --batch_tokens"
            ) from error
        self.pool.replace(actor)

    def fail(self, shard: int, reason: str, *, again: bool) -> None:
        self.attempts[shard] += 1
        if again and self.attempts[shard] < MAX_ATTEMPTS:
            # What was committed before the end stays: the first of several layers, or all of them.
            self.todo[shard] = tuple(
                layer for layer in self.todo[shard] if shard not in committed_shards(self.storage, layer)
            )
            if self.todo[shard]:
                logger.warning("shard %d is tried again: %s", shard, reason)
                self.queue.append(shard)
            else:
                self.finish(shard, 0)
            return
        logger.error("shard %d is set aside: %s", shard, reason)
        self.report.failed[shard] = reason
        if self.report.shards_done == 0 and len(self.report.failed) >= MAX_ATTEMPTS * self.pool.size:
            raise DumpError(f"a shard must succeed now and then, got {len(self.report.failed)} failures: {reason}")


def run_dump(storage: Storage, plan: DumpPlan, *, progress: bool = True) -> DumpReport:
    """Fills the missing shards of the plan's layers. Needs a Ray that was initialised.

    Shards that are committed are skipped. A shard whose actor dies or that raises is tried again, up to MAX_ATTEMPTS
    times, and then set aside; the others are finished.

    Args:
        storage: A store with tokens and with the layers created.
        plan: What to compute.
        progress: Whether to show a bar of rows on stderr.

    Returns:
        What was written; `failed` is empty if everything was.

    Raises:
        DumpError: The models do not load, or not a single shard is finished while actor after actor dies.
    """
    store = Store(storage)
    todo = missing_layers(store, plan)
    if not todo:
        return DumpReport(shards_skipped=store.num_shards)
    pool = _Pool(storage, plan)
    started = time.monotonic()
    bar = tqdm(
        total=sum(store.commit("tokens", shard).rows for shard in todo),
        desc="dump", unit="row", unit_scale=True, smoothing=0.1, disable=not progress,
        mininterval=0.5 if sys.stderr.isatty() else 10,
    )  # fmt: skip
    run = _Run(store, storage, pool, todo, bar)
    try:
        with bar:
            run.loop()
    finally:
        pool.stop()
    run.report.seconds = time.monotonic() - started
    return run.report


def missing_layers(store: Store, plan: DumpPlan) -> dict[int, tuple[str, ...]]:
    """Returns which layers of which shards the plan still has to compute."""
    layers = [*(["target"] if plan.target else []), *(losses_layer(name) for name in plan.references)]
    missing = {
        shard: tuple(layer for layer in layers if shard not in store.layers[layer].committed)
        for shard in range(store.num_shards)
    }
    return {shard: wanted for shard, wanted in missing.items() if wanted}


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()


def _last_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1]
