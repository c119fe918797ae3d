"""Rounds with plain writer processes: several write each shard of one store while they are killed.

At random moments a writer is killed with SIGKILL, or stopped and continued later (a zombie, which finishes long after
other writers assumed that it was dead). Killed writers are replaced until one has seen all shards committed.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import multiprocessing.connection
import os
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import _torture_rows as rows
from benchmarks import _torture_writer as writing
from logitstore.format import layout
from logitstore.inspection.verify import repair, verify
from logitstore.storage.local_disk import PARTIAL
from logitstore.storage.storage import Storage
from logitstore.store.reader import Store
from logitstore.store.take_back import sweep, take_back

FORKSERVER = multiprocessing.get_context("forkserver")
STALLED_S = 300
"""Seconds after the last kill without any writer finishing that count as an error."""

AIMS = (*[None] * 4, "stage", "elect", "publish", "commit", "clean")
"""Steps at which a writer is killed. None is any moment, which would rarely be a short commit step on a fast disk."""
AIM_S = 0.2
"""Seconds to wait for a writer to reach such a step."""


class TortureError(RuntimeError):
    """Raised when something happened that must never happen."""


@dataclass(kw_only=True)
class Totals:
    """Counts of all actions and findings of a run."""

    rounds: Counter = field(default_factory=Counter)
    seconds: Counter = field(default_factory=Counter)
    """Duration by kind of round."""
    started: Counter = field(default_factory=Counter)
    """Started processes by kind."""
    kills: Counter = field(default_factory=Counter)
    """Processes killed with SIGKILL by kind: driver, actor, writer, and other processes of a Ray cluster."""
    steps: Counter = field(default_factory=Counter)
    """Steps at which writers were killed."""
    faults: Counter = field(default_factory=Counter)
    """Injected faults by kind."""
    events: Counter = field(default_factory=Counter)
    """All other events in a store."""
    rows: Counter = field(default_factory=Counter)
    """Rows compared in finished stores, rows read meanwhile, and rows lost, doubled or mixed."""
    requests: int = 0
    differences: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Harm:
    """Intensity of a round."""

    writers: int
    """Number of writers at any time."""
    blows: int
    """Maximum number of kills and stops. After these, all writers may finish."""
    every_s: float
    """Mean seconds between two of them."""
    pauses: float
    """Share that stops a writer for a while instead of killing it. With 1 all writers survive and must clean up."""
    pause_s: float
    """Maximum seconds of a stop."""


def draw_harm(rng, *, in_bucket, effort):
    """Draws the intensity of a round. A shard of a layer takes about 10 ms in a folder, or 30 requests in a bucket."""
    return Harm(
        writers=rng.randint(3, 6),
        blows=round(effort * rng.randint(15, 40)),
        every_s=log_uniform(rng, 0.1, 0.6) if in_bucket else log_uniform(rng, 0.01, 0.08),
        pauses=rng.choice([0.0, 0.3, 0.6, 1.0]),
        pause_s=3.0 if in_bucket else 0.5,
    )


def log_uniform(rng, least, most):
    return math.exp(rng.uniform(math.log(least), math.log(most)))


class WriterRound:
    """One round: writes one store from the beginning to the end."""

    def __init__(self, *, url, options, direct, folder, oracles, seed, effort, totals, quiet, tick):
        """Draws the settings of the round.

        Args:
            url: URL of the store, which does not exist yet.
            options: Storage options of the writers.
            direct: Storage options of the checks.
            folder: Folder for logs.
            oracles: The expected stores, without and with the appended documents.
            seed: Seed of all draws.
            effort: Relative length of the round, usually 1.
            totals: Counts that the round adds to.
            quiet: Function that waits until all requests to the bucket have ended.
            tick: Function that is called repeatedly.
        """
        rng = random.Random(seed)
        self._rng, self._url, self._options, self._direct = rng, url, options, direct
        self._folder, self._totals, self._quiet, self._tick = Path(folder), totals, quiet, tick
        self._harm = draw_harm(rng, in_bucket=options is not None, effort=effort)
        self._conflicting = rng.random() < 0.6
        # With a common order, all writers work on the same shards at the same time.
        self._order = rng.getrandbits(32) if rng.random() < 0.6 else None
        self._append = rng.random() < 0.4
        self._num_repairs = round(effort * rng.choice([0, 1, 1, 2]))
        self._oracle = oracles[self._append]
        self._num_started = self._num_unfinished = 0
        self._paused = {}

    def run(self):
        """Writes the store under attack. Returns the differences.

        Raises:
            TortureError: A process ended with an unexpected status or output.
        """
        self._fill(append=False)
        for _ in range(self._num_repairs):
            self._damage()
            self._fill(append=False)
        if self._append:
            self._fill(append=True)
            self._totals.events["documents appended to a store"] += 1
        left = self._left()
        self._totals.events["leftovers swept"] += sweep(self._store().storage)
        if self._options is None:  # in a folder, partial files are deleted only after a day
            self._totals.events["half files of killed writers"] += len(list(Path(self._url).rglob(f"*{PARTIAL}")))
        verdict = self._oracle.compare(self._url, self._direct)
        verdict.differences += left
        return verdict

    def _left(self):
        """Lists leftovers of commits and appends if all writers finished; requests to a bucket may be delayed."""
        if self._num_unfinished or self._options is not None:
            return []
        self._totals.events["stores looked at before sweeping"] += 1
        paths = [path for path in Path(self._url).rglob("*") if path.is_file()]
        return [f"left behind: {path}" for path in leftovers(str(path.relative_to(self._url)) for path in paths)]

    def _store(self):
        return Store(Storage(self._url, self._direct))

    def _fill(self, *, append):
        """Lets writers write all missing shards, and stale ones again."""
        self._attack(append=append)
        store = self._store()
        while stale := [(name, shard) for name, layer in store.layers.items() for shard in layer.stale]:
            for name, shard in stale:
                take_back(store.storage, name, shard)
                self._totals.events["stale shards replaced"] += 1
            self._attack(append=append)
            store = self._store()

    def _attack(self, *, append):
        """Starts writers for all missing shards, and kills them meanwhile."""
        stop = self._folder / f"stop-{self._num_started}"
        reader = self._start(writing.read, append, str(stop))
        crew = [self._start(writing.write, append) for _ in range(self._harm.writers)]
        try:
            self._fight(crew, append)
            stop.touch()
            self._settle(reader)
        finally:
            for process in [*crew, reader]:
                process.kill()
        self._totals.rows["read meanwhile"] += int(stop.read_text() or 0)
        self._quiet()

    def _fight(self, crew, append):
        """Kills and replaces writers, until one has finished and all have ended."""
        blows, done, give_up = 0, False, time.monotonic() + STALLED_S
        blow = time.monotonic() + self._wait()
        while crew:
            sentinels = [process.sentinel for process in crew]
            multiprocessing.connection.wait(sentinels, timeout=max(0.0, min(blow - time.monotonic(), 0.1)))
            for process in [process for process in crew if process.exitcode is not None]:
                crew.remove(process)
                done = self._settle(process) or done
                if not done:
                    crew.append(self._start(writing.write, append))
            if done and self._paused and len(self._paused) == len(crew):
                self._wake(everybody=True)  # stopped writers continue as zombies: all shards are committed by now
            self._wake()
            if crew and time.monotonic() >= blow:
                blow = time.monotonic() + self._wait()
                if blows < self._harm.blows and (victim := self._victim(crew)) is not None:
                    blows += 1
                    give_up = time.monotonic() + STALLED_S
                    self._strike(victim)
            if time.monotonic() > give_up:
                raise TortureError(f"writers must finish, got none that does within {STALLED_S} s")
            self._tick()

    def _wait(self):
        return self._rng.expovariate(1 / self._harm.every_s)

    def _start(self, what, append, *more):
        """Starts a writer or a reader."""
        self._num_started += 1
        job = writing.Job(
            url=self._url,
            options=self._options,
            seed=self._rng.getrandbits(32) if self._order is None or what is writing.read else self._order,
            variant=self._rng.randrange(rows.VARIANTS) if self._conflicting else 0,
            append=append,
            threads=self._rng.choice([1, 2]),
            again=self._rng.random() < 0.2,
            log=str(self._folder / f"{what.__name__}-{self._num_started}.log"),
        )
        process = FORKSERVER.Process(target=what, args=(job, *more), name=job.log)
        process.start()
        self._totals.started["reader" if what is writing.read else "writer"] += 1
        return process

    def _victim(self, crew):
        """Chooses any process, or one that is at a drawn step of a commit now; None if there is none."""
        wanted, give_up = self._rng.choice(AIMS), time.monotonic() + AIM_S
        while wanted is not None and time.monotonic() < give_up:
            for process in crew:
                if step_of(process) == wanted:
                    return process
            time.sleep(0.0001)
        victim = self._rng.choice(crew)
        # Starting takes longer than a shard, so most writers would never get beyond it.
        return victim if step_of(victim) != writing.START or self._rng.random() < 0.1 else None

    def _strike(self, process):
        """Kills a process, or stops it."""
        if self._rng.random() < self._harm.pauses:
            send(process, signal.SIGSTOP)
            self._totals.events["writers stopped for a while"] += 1
            self._paused[process] = time.monotonic() + self._rng.random() * self._harm.pause_s
        else:
            send(process, signal.SIGKILL)

    def _wake(self, *, everybody=False):
        for process, until in list(self._paused.items()):
            if everybody or time.monotonic() > until or process.exitcode is not None:
                del self._paused[process]
                send(process, signal.SIGCONT)

    def _settle(self, process):
        """Counts the end of a process. Returns whether it finished its work."""
        process.join()
        log = Path(process.name)
        self._num_unfinished += process.exitcode != 0
        if process.exitcode == -signal.SIGKILL:
            self._totals.kills["writer"] += 1
            self._totals.steps[step_of(process)] += 1
        elif process.exitcode == writing.GAVE_UP:
            self._totals.events["writers given up by the bucket"] += 1
        elif process.exitcode != 0:
            said = log.read_text().strip()
            raise TortureError(f"{log.name} ended with {process.exitcode}: {said.rpartition(chr(10))[2]}")
        return process.exitcode == 0

    def _damage(self):
        """Takes shards back, or damages them so that verify takes them back, while no process is writing."""
        storage = Storage(self._url, self._direct)
        for _ in range(self._rng.randint(1, 3)):
            # The target is chosen most often: if another variant of its rows comes next, the losses become stale.
            layer, shard = self._rng.choice([*rows.LAYERS, "target"]), self._rng.randrange(rows.NUM_SHARDS)
            array = self._rng.choice(layout.layer_arrays(layer))
            path = layout.object_path(layer, array, shard)
            (data,) = storage.get_many([path], [2**30])
            harm = self._rng.choice(["take back", "flip", "cut", "delete"])
            if harm == "take back" or data is None:
                take_back(storage, layer, shard)
                self._totals.events["shards taken back"] += 1
                continue
            self._totals.events["objects damaged"] += 1
            place = self._rng.randrange(len(data))
            if harm == "flip":
                storage.put(path, data[:place] + bytes([data[place] ^ 1 << self._rng.randrange(8)]) + data[place + 1 :])
            elif harm == "cut":
                storage.put(path, data[:place])
            else:
                storage.remove(path)
        store = self._store()
        repair(store, verify(store))


def leftovers(paths):
    """Returns the paths of files that should exist only while a shard or an append is being written."""
    return [path for path in paths if path.startswith("staging/") or path.endswith((PARTIAL, ".claim"))]


def step_of(process):
    """Returns the current or last step of a writer."""
    try:
        return Path(f"{process.name}.step").read_text().strip() or writing.START
    except FileNotFoundError:
        return writing.START


def send(process, signal_number):
    """Sends a signal to a process that may have ended."""
    if process.exitcode is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal_number)
