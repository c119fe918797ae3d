"""Hands missing shards out to Ray actors, waits for the results, and retries or sets aside shards that fail."""

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

from logitstore.dump.actors import PROGRESS, Pool
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

logger = logging.getLogger(__name__)

FATAL = (StorageRefusedError, IdentityError, FidelityError)
"""Errors that end the dump, because every other shard would fail in the same way.

StorageRefusedError: the disk or the bucket refuses an operation (no space, no permission). IdentityError: another job
replaced a layer. FidelityError: storing the target's rows loses more than `max_kl`."""

PROGRESS_S = 1.0
"""Interval in seconds at which actors are asked for the progress of running shards."""

RAISED = re.compile(r"^[\w.]*(?:Error|Exception)(?=: |$)", re.MULTILINE)
"""Matches the name of an exception at the beginning of a line, in a traceback that Ray returns as text. The last match
is the exception that was raised."""


class _Run:
    """The loop that hands shards out to actors, waits for the results, and records them."""

    def __init__(self, store: Store, pool: Pool, todo: Todo, bar: tqdm[Any]) -> None:
        # Number of rows of each shard. Every shard has tokens, so a shard's number is its index in this array.
        self.rows = store.layers["tokens"].index.rows
        self.storage = store.storage
        self.pool = pool
        self.todo = todo
        self.schedule = Schedule(list(todo.shards), len(pool.actors), todo.failed_before)
        self.report = DumpReport(shards_skipped=store.num_shards - len(todo.shards))
        self.bar = bar
        self.running: dict[Any, tuple[Any, int, int]] = {}
        self.shown: dict[int, int] = {}
        """Number of rows that the progress bar already shows for each running shard."""
        self.asked: dict[Any, int] = {}
        """Place of each actor that was asked for its progress and has not answered yet. The key is the Ray object
        reference of the answer."""

    def loop(self) -> None:
        while not self.schedule.is_done:
            for slot, shard in self.schedule.hand_out():
                actor = self.pool.actors[slot]
                result = actor.dump.remote(shard, self.todo.layers, self.todo.shards[shard])
                self.running[result] = (actor, slot, shard)
            finished, _ = ray.wait([*self.pool.starting, *self.running], num_returns=1, timeout=PROGRESS_S)
            if not finished:
                self.show_progress()
            for done in finished:
                if done in self.running:
                    self.settle(done, *self.running.pop(done))
                else:
                    self.open(done, self.pool.starting.pop(done))

    def show_progress(self) -> None:
        """Shows the progress of running shards from the answers that have arrived, and asks actors for new answers."""
        if self.bar.disable:
            return
        answered, _ = ray.wait(list(self.asked), num_returns=len(self.asked), timeout=0) if self.asked else ([], [])
        for answer in answered:
            slot = self.asked.pop(answer)
            try:
                shares = ray.get(answer)
            except RayError:  # The actor died. Its shards fail too, and `settle` deals with them.
                continue
            here = {shard for _, at, shard in self.running.values() if at == slot}
            for shard in here & shares.keys():
                self.show(shard, int(shares[shard] * self.rows[shard]))
        # An actor is asked again only after it has answered, so that requests to a slow actor do not pile up.
        for slot in {at for _, at, _ in self.running.values()} - set(self.asked.values()):
            actor = self.pool.actors[slot]
            if actor is not None:
                self.asked[actor.progress.options(concurrency_group=PROGRESS).remote()] = slot

    def show(self, shard: int, rows: int) -> None:
        """Sets how many rows of a shard the progress bar counts as done."""
        self.bar.update(rows - self.shown.pop(shard, 0))
        if 0 < rows < self.rows[shard]:
            self.shown[shard] = rows

    def open(self, started: Any, slot: int) -> None:  # noqa: ANN401
        """Opens the slot of an actor if the actor has started. If the start failed, counts a failure of the slot."""
        try:
            ray.get(started)
        except RayError as error:
            if not (isinstance(error, ActorDiedError) and error.actor_init_failed):
                self.blame(slot, None, f"its process died, perhaps for lack of memory ({_line(error)})", is_lost=True)
                return
            # Ray passes on an error in the actor's constructor only as text.
            starts = [found.start() for found in RAISED.finditer(str(error))]
            raised = textwrap.shorten(str(error)[starts[-1] if starts else 0 :], 500, placeholder=" ...")
            name, _, reason = raised.partition(": ")
            if name.rpartition(".")[2] in {kind.__name__ for kind in FATAL}:
                raise DumpError(reason) from error
            self.blame(slot, None, raised, is_lost=True)
        else:
            self.bar.set_description("dump")
            self.schedule.open(slot)

    def settle(self, result: Any, actor: Any, slot: int, shard: int) -> None:  # noqa: ANN401
        is_there = self.pool.actors[slot] is actor  # False if the actor was replaced in the meantime.
        try:
            written = ray.get(result)
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            if isinstance(cause, FATAL):
                raise DumpError(_line(cause)) from error
            if isinstance(cause, DamagedShardError):
                way_out = "`logitstore verify --repair` takes it back, and the dump then writes it again"
                self.fail(slot, shard, f"layer {cause.layer!r} is damaged: {cause.reason}; {way_out}", again=False)
                return
            # A ValueError is caused by the documents, so that another attempt would fail too. Other errors, such as
            # those of a bucket or a device, may be gone at the next attempt.
            again = not isinstance(cause, ValueError)
            self.fail(slot, shard, f"{type(cause).__name__}: {_line(cause)}", again=again)
            if is_there:
                self.blame(slot, shard, _line(cause), is_lost=isinstance(cause, torch.AcceleratorError))
        except RayError as error:
            self.fail(slot, shard, f"its actor died ({_line(error)})", again=True)
            if is_there:
                self.blame(slot, shard, _line(error), is_lost=True)
        else:
            self.finish(slot, shard, written)

    def finish(self, slot: int, shard: int, written: list[Commit]) -> None:
        self.schedule.finish(slot, shard)
        self.show(shard, int(self.rows[shard]))
        if not written:  # The shard was committed already: by another job, or by an actor that died afterwards.
            self.report.shards_skipped += 1
            return
        self.report.shards_done += 1
        self.report.rows += int(self.rows[shard])
        self.report.entries += sum(commit.entries for commit in written)

    def blame(self, slot: int, shard: int | None, reason: str, *, is_lost: bool) -> None:
        """Counts a failure of a slot. Gives the slot up if it failed too often.

        If the slot is not given up, and its actor is lost, a new actor is started there.

        Args:
            slot: The slot where the failure happened.
            shard: The shard that failed; None if the actor could not be started.
            reason: The cause of the failure in one line.
            is_lost: Whether the actor has become unusable.

        Raises:
            DumpError: The last slot is given up, but some shards are neither finished nor set aside.
        """
        if not self.schedule.blame(slot, shard):
            if shard is None:
                logger.warning("an actor could not load the models; it is started again: %s", reason)
            if is_lost:
                self.schedule.close(slot)
                self.pool.replace(slot)
            return
        self.pool.give_up(slot)
        # The failed shard may have been the last one. The dump then ends normally.
        if self.schedule.is_done:
            return
        if self.schedule.has_slots:
            logger.error(
                "an actor was given up after too many failures; the dump goes on with one actor fewer: %s",
                reason,
            )
        elif shard is None:
            raise DumpError(f"no actor could load the models: {reason}. Fix the cause and run the same command again")
        else:
            hint = "; too little memory is the usual cause: give a smaller --batch_tokens" if is_lost else ""
            raise DumpError(
                f"all shards that were tried failed; the last error was: {reason}{hint}. Fix the cause and run the "
                "same command again; finished shards are kept"
            )

    def fail(self, slot: int, shard: int, reason: str, *, again: bool) -> None:
        self.show(shard, 0)
        if not self.schedule.fail(slot, shard, again=again):
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
            logger.warning("shard %d is set aside, but that could not be recorded: %s", shard, _line(error))


def run_dump(store: Store, plan: DumpPlan, todo: Todo | None = None, *, progress: bool = True) -> DumpReport:
    """Computes the missing and stale shards of the plan's layers. Ray must be initialised before the call.

    Shards that are committed and not stale are skipped. If a shard raises an error or its actor dies, the shard is
    tried up to MAX_ATTEMPTS times and then set aside. The dump goes on with the other shards.

    If another job or a repair takes shards back during the dump, these shards are reported, but not computed again.

    Args:
        store: A store that was opened just before the call. It must have tokens, and the layers of the plan must exist.
        plan: The layers to fill, the models and the resources.
        todo: The result of `find_missing`. If None, this function calls `find_missing` itself.
        progress: Whether to show a progress bar on stderr. The bar counts rows.

    Returns:
        The report of the dump, with the numbers of rows, entries and shards that were written, and the shards and
        documents that could not be computed.

    Raises:
        DumpError: The dump stopped early for one of these reasons: no actor can load the models; the disk or the
            storage service refuses; another job writes the layers with another model; storing a shard loses more than
            `max_kl`; or all shards that were tried failed.
        IdentityError: Another job replaced a layer of the plan with a layer of another model.
        StorageError: The store cannot be reached.
    """
    storage = store.storage
    extent = store.num_shards  # Shards that other jobs append meanwhile are left to these jobs.
    todo = find_missing(store, plan) if todo is None else todo
    report = _run(store, plan, todo, progress=progress) if todo.shards else DumpReport(shards_skipped=store.num_shards)
    # Opened again, because the index of an open store does not show later commits.
    store = Store(storage)
    check_makers(store.storage, plan.made_by)
    sweep(storage)
    for layer in plan.made_by:
        set_aside.clear_committed(storage, layer)
        report.counted[layer] = int(store.layers[layer].index.upto(store.num_shards).counted.sum())
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
    # In a log file, where each update of the bar is kept, the bar is updated less often than in a terminal.
    bar = tqdm(
        total=int(store.layers["tokens"].index.rows[list(todo.shards)].sum()),
        desc="loading models", unit="row", unit_scale=True, smoothing=0.1, disable=not progress,
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


def find_missing(store: Store, plan: DumpPlan) -> Todo:
    """Finds the shards in which layers of the plan are missing or must be replaced.

    Raises:
        IdentityError: Another job replaced a layer of the plan with a layer of another model.
    """
    check_makers(store.storage, plan.made_by)
    return find_todo(store, list(plan.made_by), retry_set_aside=plan.retry_set_aside)


def _line(error: BaseException) -> str:
    """Returns the first non-blank line of an error's message, or the name of the error's class if there is none."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()
