"""Rounds with the real job: jobs/dump_logits.py on its own Ray cluster, run again until it exits with status 0.

At random moments its actors, only its driver, or all its processes at once are killed. Sometimes the next run starts
while actors of the last one are still alive, and sometimes a second job with the same command runs beside it.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks._torture_attack import TortureError
from logitstore.storage.storage import Storage
from logitstore.store.take_back import sweep

ROOT = Path(__file__).parent.parent
MAX_RUNS = 12
QUIET_RUNS = 4
"""Number of runs after which no process is killed any more."""
RUN_S = 600
"""Maximum seconds of a run; such a small job is always faster."""
UNREACHABLE = "must be one that can be reached"
"""Text in the error line of a job when the bucket failed too often."""


def make_command(folder):
    """Makes models and documents as the tests do. Returns the command without the store."""
    from transformers.utils import logging

    from tests.helpers.tiny import functions, make_model, make_tokenizer, write_jsonl

    logging.disable_progress_bar()
    tokenizer = make_tokenizer(folder / "tokenizer")
    target = make_model(folder / "target", tokenizer, hidden=48, layers=2, seed=1)
    reference = make_model(folder / "reference", tokenizer, hidden=16, layers=1, seed=3, scale=0.1)
    data = write_jsonl(folder / "functions.jsonl", functions(24))
    return [
        sys.executable, str(ROOT / "jobs" / "dump_logits.py"), "--target", target, "--reference", f"ref={reference}",
        "--data", data, "--max_length", "128", "--shard_rows", "256", "--k", "12", "--num_proc", "1",
        "--cpus_per_actor", "1", "--batch_tokens", "256", "--no_progress",
    ]  # fmt: skip


class Job:
    """One run of the command, and all processes that it started."""

    def __init__(self, command, folder, number):
        self.log = folder / f"job-{number}.log"
        # The folder contains sockets, whose paths must be short.
        self.temporary = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
        environment = os.environ | {
            "HF_DATASETS_CACHE": str(folder / "datasets"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
            "RAY_ADDRESS": "local", "RAY_TMPDIR": self.temporary, "RAY_USAGE_STATS_ENABLED": "0",
            "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1",
        }  # fmt: skip
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        self.driver = psutil.Process(self._process.pid)
        self.family = {self.driver.pid: self.driver}
        self.started = time.monotonic()
        self.kills = 0
        self.faults_before = 0
        """Number of faults of the bucket before the start of the job."""

    def look(self):
        """Updates the list of the job's processes. Returns its exit status, None while it runs."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in self.driver.children(recursive=True):
                self.family.setdefault(child.pid, child)
        return self._process.poll()

    def actors(self):
        """Returns its living actors, including those that still load their models."""
        return [process for process in self.family.values() if is_actor(process)]


def is_actor(process):
    try:
        return "ShardDumper" in " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return False


class RayRound:
    """One round: the job writes one store from the beginning to the end."""

    def __init__(self, *, url, options, direct, folder, command, oracle, seed, totals, quiet, tick):
        """Takes the arguments of WriterRound, with the command of the job and the oracle of one undisturbed store."""
        self._rng = random.Random(seed)
        self._folder, self._oracle, self._totals, self._quiet, self._tick = Path(folder), oracle, totals, quiet, tick
        self._url, self._direct = url, direct
        self._command = [*command, "--store", url]
        if options is not None:
            (self._folder / "options.json").write_text(json.dumps(options))
            self._command += ["--storage_options", str(self._folder / "options.json")]
        self._storage = Storage(url, direct)
        self._jobs = []

    def run(self):
        """Runs the job until the store is finished. Returns the differences.

        Raises:
            TortureError: A job ended with an unexpected status or output, or no run ended with 0.
        """
        try:
            for number in range(MAX_RUNS):
                if self._run(peaceful=number >= QUIET_RUNS):
                    break
            else:
                raise TortureError(f"a job must finish, got {MAX_RUNS} runs without: {self._jobs[-1].log.read_text()}")
            killed = [job for job in self._jobs if job.look() == -signal.SIGKILL]
            zombies = [actor for job in killed for actor in job.actors()]
        finally:
            self._bury()
        self._quiet()
        if zombies:  # actors of killed drivers may have staged files after the last job had cleaned up
            self._totals.events["actors that outlived the last job"] += len(zombies)
            self._totals.events["leftovers swept"] += sweep(self._storage)
        return self._oracle.compare(self._url, self._direct)

    def undisturbed(self):
        """Runs the job once without any disturbance."""
        try:
            if not self._run(peaceful=True):
                raise TortureError(f"undisturbed job must finish, got {self._jobs[-1].log.read_text()}")
        finally:
            self._bury()

    def _start(self):
        actors = str(self._rng.choice([1, 2]))
        job = Job([*self._command, "--num_actors", actors], self._folder, len(self._jobs))
        job.faults_before = self._totals.faults.total()
        self._jobs.append(job)
        self._totals.started["job"] += 1
        return job

    def _run(self, *, peaceful):
        """Runs the command once, or two jobs at once. Returns whether the store is finished."""
        rng, running = self._rng, [self._start()]
        second = not peaceful and rng.random() < 0.3
        # When the driver is killed: at its start, after a number of committed shards, or not at all.
        end = None if peaceful else rng.choice([None, "start", "shards", "shards"])
        after_s, after_shards = rng.uniform(3, 12), rng.randint(1, 20)
        actor_kills = 0 if peaceful else rng.randint(0, 5)
        next_kill, finished = None, False
        while running:
            time.sleep(0.1)
            self._tick()
            for job in list(running):
                if (status := job.look()) is not None:
                    running.remove(job)
                    finished = self._judge(job, status) or finished
                elif time.monotonic() > job.started + RUN_S:
                    raise TortureError(f"a run must end, got {RUN_S} s without: {job.log.read_text()}")
            if not running:
                break
            if second and running[0].actors():
                second = False
                self._totals.events["second jobs beside another"] += 1
                running.append(self._start())
            actors = [(job, actor) for job in running for actor in job.actors()]
            if actors and actor_kills:
                next_kill = next_kill or time.monotonic() + rng.expovariate(1 / 1.5)
                if time.monotonic() >= next_kill:
                    next_kill, actor_kills = None, actor_kills - 1
                    self._kill(*rng.choice(actors))
            if end == "start" and time.monotonic() > running[0].started + after_s:
                end = self._end(running[0])
            if end == "shards" and len(self._storage.names("commits/target")) >= after_shards:
                time.sleep(rng.random() * 0.3)
                end = self._end(running[0])
        return finished

    def _end(self, job):
        """Kills a driver alone, or all its processes at once with the driver first or last."""
        whole = self._rng.random() < 0.6
        job.look()
        members = [member for member in job.family.values() if member.pid != job.driver.pid] if whole else []
        members.insert(self._rng.choice([0, len(members)]), job.driver)
        for member in members:
            self._kill(job, member)
        self._totals.events["whole families killed" if whole else "drivers killed alone"] += 1

    def _kill(self, job, process):
        kind = "driver" if process.pid == job.driver.pid else "actor" if is_actor(process) else "other of a Ray"
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
                return  # the process had already ended
            process.send_signal(signal.SIGKILL)
            self._totals.kills[kind] += 1
            job.kills += 1

    def _judge(self, job, status):
        """Counts the end of a run. Returns whether it finished the store."""
        said = job.log.read_text()
        if status == -signal.SIGKILL:
            return False
        if status == 0:
            return True
        self._totals.events[f"runs that ended with {status}"] += 1
        self._tick()
        had_faults = self._totals.faults.total() > job.faults_before
        excused = (status in (1, 3) and job.kills) or (had_faults and (status == 3 or UNREACHABLE in said))
        if re.search(r"^Traceback ", said, re.MULTILINE):  # tracebacks of actors are indented and do not count
            excused = "ray.init(" in said  # Ray does not always start on a busy machine
        if not excused:
            raise TortureError(f"a job must end with 0, or say in one line why not, got {status}: {said}")
        return False

    def _bury(self):
        """Ends the remaining processes of all runs. Most of them end by themselves."""
        left = [member for job in self._jobs for member in job.family.values() if member.is_running()]
        _, alive = psutil.wait_procs(left, timeout=5)
        for member in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(alive, timeout=20)
        for job in self._jobs:
            shutil.rmtree(job.temporary, ignore_errors=True)
