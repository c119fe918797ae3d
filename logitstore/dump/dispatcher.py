"""Ray actors over the shards that are missing. No file of the package but this and `pool` imports ray."""

from __future__ import annotations

import logging
import re
import sys
import textwrap
import time
from typing import TYPE_CHECKING, Any

import ray
import torch
from ray.exceptions import ActorDiedError, RayError, RayTaskError
from tqdm import tqdm

from logitstore.dump.actors import Pool
from logitstore.dump.missing import Todo, check_makers, documents_set_aside, find_todo
from logitstore.dump.plan import DumpError, DumpPlan, DumpReport
from logitstore.dump.schedule import Schedule
from logitstore.errors import DamagedShardError, FidelityError, IdentityError, StorageError, StorageRefusedError
from logitstore.store.catalog import runs, spans
from logitstore.store.commits import set_aside
from logitstore.store.commits.index import commit_names
from logitstore.store.reader import Store
from logitstore.store.take_back import sweep

if TYPE_CHECKING:
    from logitstore.format.commit import Commit
    from logitstore.storage.storage import Storage

logger = logging.getLogger(__name__)

FATAL = (StorageRefusedError, IdentityError, FidelityError)
"""No other shard would do better: no space, no permission, the layer is another job's by now, or it loses too much."""

RAISED = re.compile(r"^[\w.]*(?:Error|Exception)(?=: |$)", re.MULTILINE)
"""Where a traceback that Ray hands over as text comes to what was raised; the last one is meant."""


class _Run:
    """The loop over shards: hand out, wait, settle."""

    def __init__(self, store: Store, pool: Pool, todo: Todo, bar: tqdm[Any]) -> None:
        self.rows = store.layers["tokens"].index.rows  # without a gap: shards are their own places
        self.storage = store.storage
        self.pool = pool
        self.todo = todo
        self.schedule = Schedule(list(todo.shards), len(pool.actors), todo.failed_before)
        self.report = DumpReport(shards_skipped=store.num_shards - len(todo.shards))
        self.bar = bar
        self.running: dict[Any, tuple[Any, int, int]] = {}

    def loop(self) -> None:
        while not self.schedule.is_done:
            for place, shard in self.schedule.hand_out():
                actor = self.pool.actors[place]
                result = actor.dump.remote(shard, self.todo.layers, self.todo.shards[shard])
                self.running[result] = (actor, place, shard)
            (done,), _ = ray.wait([*self.pool.starting, *self.running], num_returns=1)
            if done in self.running:
                self.settle(done, *self.running.pop(done))
            else:
                self.open(done, self.pool.starting.pop(done))

    def open(self, started: Any, place: int) -> None:  # noqa: ANN401
        """Lets an actor have shards from now on, if it could be started."""
        try:
            ray.get(started)
        except RayError as error:
            if not (isinstance(error, ActorDiedError) and error.actor_init_failed):
                self.blame(place, None, f"its process died, as with too little memory ({_line(error)})", is_lost=True)
                return
            starts = [found.start() for found in RAISED.finditer(str(error))]
            raised = textwrap.shorten(str(error)[starts[-1] if starts else 0 :], 500, placeholder=" ...")
            name, _, reason = raised.partition(": ")
            if name.rpartition(".")[2] in {kind.__name__ for kind in FATAL}:
                raise DumpError(reason) from error
            self.blame(place, None, raised, is_lost=True)
        else:
            self.schedule.open(place)

    def settle(self, result: Any, actor: Any, place: int, shard: int) -> None:  # noqa: ANN401
        is_there = self.pool.actors[place] is actor  # and not replaced since
        try:
            written = ray.get(result)
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            if isinstance(cause, FATAL):
                raise DumpError(_line(cause)) from error
            if isinstance(cause, DamagedShardError):
                way_out = "`logitstore verify --repair` takes it back, and the dump then writes it again"
                self.fail(place, shard, f"layer {cause.layer!r} is damaged: {cause.reason}; {way_out}", again=False)
                return
            # Wrong numbers stay wrong; anything else (a bucket, a device) may pass.
            again = not isinstance(cause, ValueError)
            self.fail(place, shard, f"{type(cause).__name__}: {_line(cause)}", again=again)
            if is_there:
                self.blame(place, shard, _line(cause), is_lost=isinstance(cause, torch.AcceleratorError))
        except RayError as error:
            self.fail(place, shard, f"its actor died ({_line(error)})", again=True)
            if is_there:
                self.blame(place, shard, _line(error), is_lost=True)
        else:
            self.finish(place, shard, written)

    def finish(self, place: int, shard: int, written: list[Commit]) -> None:
        self.schedule.finish(place, shard)
        self.bar.update(int(self.rows[shard]))
        if not written:  # another job did it, or an actor that died after it
            self.report.shards_skipped += 1
            return
        self.report.shards_done += 1
        self.report.rows += int(self.rows[shard])
        self.report.entries += sum(commit.entries for commit in written)

    def blame(self, place: int, shard: int | None, reason: str, *, is_lost: bool) -> None:
        """Counts a failure against the place where it happened, and puts another actor there if need be.

        Args:
            place: Where.
            shard: Of which shard; None if the actor could not be started.
            reason: Why, in one line.
            is_lost: Whether the actor is of no use any more.
        """
        if not self.schedule.blame(place, shard):
            if shard is None:
                logger.warning("an actor is started again, it could not load the models: %s", reason)
            if is_lost:
                self.schedule.close(place)
                self.pool.replace(place)
            return
        self.pool.give_up(place)
        if self.schedule.is_done:
            return
        if self.schedule.has_places:
            logger.error("one actor less is used, because all that was tried there failed: %s", reason)
        elif shard is None:
            raise DumpError(f"models must load on an actor, got {reason}")
        else:
            hint = "; too little memory is the usual cause: give a smaller --batch_tokens" if is_lost else ""
            raise DumpError(f"shards must succeed now and then, got only failures: {reason}{hint}")

    def fail(self, place: int, shard: int, reason: str, *, again: bool) -> None:
        if not self.schedule.fail(place, shard, again=again):
            logger.warning("shard %d is tried again: %s", shard, reason)
            return
        logger.error("shard %d is set aside: %s", shard, reason)
        self.report.failed[shard] = reason[: set_aside.REASON_LENGTH]
        try:
            for layer in self.todo.layers:
                if not commit_names(self.storage, layer, shard):
                    set_aside.record(self.storage, layer, shard, reason, self.schedule.attempts(shard))
        except StorageRefusedError as error:
            raise DumpError(_line(error)) from error
        except StorageError as error:
            logger.warning("that shard %d is set aside could not be recorded: %s", shard, _line(error))


def run_dump(storage: Storage, plan: DumpPlan, *, progress: bool = True) -> DumpReport:
    """Fills the missing shards of the plan's layers, and replaces stale ones. Needs a Ray that was initialised.

    Shards that are committed are skipped. A shard whose actor dies or that raises is tried again, up to MAX_ATTEMPTS
    times, and then set aside; the others are finished. What other jobs and repairs take back at the same time is not
    computed once more, but reported.

    Args:
        storage: A store with tokens and with the layers created.
        plan: What to compute.
        progress: Whether to show a bar of rows on stderr.

    Returns:
        What was written, and what could not be.

    Raises:
        DumpError: The models load on no actor, the disk or the service refuses, another job writes the layers with
            another model, a shard is above `max_kl`, or shard after shard fails.
        IdentityError: Another job began a layer anew.
        StorageError: The store cannot be reached.
    """
    store = Store(storage)
    extent = store.num_shards  # what others append meanwhile is theirs to compute
    todo = _find_todo(store, plan)
    report = _run(store, plan, todo, progress=progress) if todo.shards else DumpReport(shards_skipped=store.num_shards)
    store = Store(storage)
    check_makers(store.storage, plan.made_by)
    sweep(storage)
    for layer in plan.made_by:
        set_aside.clear_committed(storage, layer)
        if found := int(store.layers[layer].index.upto(store.num_shards).set_aside.sum()):
            report.num_documents[layer] = found
            report.documents[layer] = documents_set_aside(store, store.layers[layer])
        if missing := sorted(set(range(extent)).difference(store.layers[layer].committed, report.failed)):
            report.missing[layer] = missing
    stale = {name: sorted(n for n in layer.stale if n < extent) for name, layer in store.layers.items()}
    report.stale = {name: numbers for name, numbers in stale.items() if numbers}
    return report


def _run(store: Store, plan: DumpPlan, todo: Todo, *, progress: bool) -> DumpReport:
    for layer, shards in todo.stale.items():
        logger.warning("%s: %d stale shards are computed again: %s", layer, len(shards), spans(runs(shards)))
    for layer, shards in todo.retried.items():
        logger.warning("%s: %d shards with documents set aside are tried again: %s", layer, len(shards),
                       spans(runs(shards)))  # fmt: skip
    pool = Pool(store.storage, plan)
    started = time.monotonic()
    bar = tqdm(
        total=int(store.layers["tokens"].index.rows[list(todo.shards)].sum()),
        desc="dump", unit="row", unit_scale=True, smoothing=0.1, disable=not progress,
        mininterval=0.5 if sys.stderr.isatty() else 10,
    )  # fmt: skip
    run = _Run(store, pool, todo, bar)
    try:
        with bar:
            run.loop()
    finally:
        pool.stop()
    run.report.seconds = time.monotonic() - started
    return run.report


def needs_models(storage: Storage, plan: DumpPlan) -> bool:
    """Returns whether the plan has anything to compute."""
    return bool(_find_todo(Store(storage), plan).shards)


def _find_todo(store: Store, plan: DumpPlan) -> Todo:
    check_makers(store.storage, plan.made_by)
    return find_todo(store, list(plan.made_by), retry_set_aside=plan.retry_set_aside)


def _line(error: BaseException) -> str:
    """Writes an error in one line: its first, if it has more."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()
