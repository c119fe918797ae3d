"""Runs the rounds of a torture run one after another, with their common bucket and undisturbed stores."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import shutil
import sys
import time
from dataclasses import replace
from multiprocessing import resource_tracker
from pathlib import Path

from benchmarks import _torture_rows as rows
from benchmarks import _torture_writer as writing
from benchmarks._torture_attack import FORKSERVER, TortureError, Totals, WriterRound
from benchmarks._torture_oracle import Oracle, snapshot
from benchmarks._torture_ray import RayRound, make_command
from tests.helpers.faults import KINDS, FaultyProxy, S3Server, s3_options

SHARES = {"local": 0.08, "s3": 0.45, "ray-local": 0.2, "ray-s3": 0.27}
"""Share of the time for each kind of round."""

RATES = {"s3": (0.1, 0.2, 0.3), "ray-s3": (0.1, 0.15)}
"""Shares of requests that fail. A job writes shards of tokens one after another, and waits after most faults."""


class Bucket:
    """An S3 server and the proxy that injects faults."""

    def __init__(self, stack, seed, totals):
        self._server = stack.enter_context(S3Server())
        self._proxy = stack.enter_context(FaultyProxy(self._server.url, seed=seed))
        self._totals = totals
        self.direct = s3_options(self._server.url)

    def begin(self, name, rng, rates):
        """Makes an empty bucket and draws its faults. Returns the storage options of the writers."""
        self._server.reset()
        self._server.make_bucket(name)
        kinds = KINDS if rng.random() < 0.6 else rng.sample(KINDS, 2)
        self._proxy.set(rate=rng.choice(rates), kinds=kinds)
        options = s3_options(self._proxy.url)
        if rng.random() < 0.5:  # otherwise botocore hides most faults from logitstore
            options["config_kwargs"] = {"retries": {"max_attempts": 1}}
        return options

    def quiet(self):
        """Waits until all requests of killed writers have ended."""
        while self._proxy.busy:
            time.sleep(0.01)

    def count(self):
        """Adds the new faults to the totals."""
        self._totals.requests = self._proxy.requests
        self._totals.faults.update({kind: n - self._totals.faults[kind] for kind, n in self._proxy.faults.items()})


class Run:
    """Rounds of several kinds until the time is over."""

    def __init__(self, folder, stack, *, minutes, seed, kinds, effort):
        self._folder, self._minutes, self._seed, self._kinds = Path(folder), minutes, seed, kinds
        self._effort = effort
        self._started, self._next_line = time.monotonic(), 0.0
        self.totals = Totals()
        self._bucket = Bucket(stack, seed, self.totals) if any("s3" in kind for kind in kinds) else None
        self._oracles = self._command = self._ray_oracle = None

    def run(self):
        """Runs the rounds. Returns whether all stores were as expected; the folder of one that differs is kept."""
        while time.monotonic() - self._started < 60 * self._minutes or len(self.totals.rounds) < len(self._kinds):
            # The kind with the smallest part of its share so far comes next.
            kind = min(self._kinds, key=lambda name: self.totals.seconds[name] / SHARES[name])
            number = self.totals.rounds.total()
            seed = random.Random(f"{self._seed} {number}").getrandbits(32)
            folder = self._folder / f"round-{number}"
            folder.mkdir()
            started = time.monotonic()
            try:
                differences = self._round(kind, folder, number, seed)
            except TortureError as error:
                differences = [str(error)]
            self.totals.rounds[kind] += 1
            self.totals.seconds[kind] += time.monotonic() - started
            self._say(f"round {number} {kind} seed {seed}: {time.monotonic() - started:.1f} s; {self.line()}")
            if differences:
                self.totals.differences += differences
                if "s3" in kind:
                    keep(f"s3://round-{number}/cache.zarr", self._bucket.direct, folder / "cache.zarr")
                print(f"round {number} ({kind}, seed {seed}) of seed {self._seed} differs; see {folder}")
                print("\n".join(f"  {difference}" for difference in differences[:20]))
                return False
            shutil.rmtree(folder)
        return True

    def _round(self, kind, folder, number, seed):
        """Runs one round. Returns the differences of its store."""
        name = f"round-{number}"
        arguments = {"folder": folder, "seed": seed, "totals": self.totals, "tick": self.tick}
        if "s3" in kind:
            options = self._bucket.begin(name, random.Random(seed), RATES[kind])
            arguments |= {"url": f"s3://{name}/cache.zarr", "options": options}
            arguments |= {"direct": self._bucket.direct, "quiet": self._bucket.quiet}
        else:
            arguments |= {"url": str(folder / "cache.zarr"), "options": None, "direct": None, "quiet": lambda: None}
        if kind.startswith("ray"):
            self._prepare_ray()
            one = RayRound(command=self._command, oracle=self._ray_oracle, **arguments)
        else:
            self._oracles = self._oracles or make_oracles(self._folder)
            one = WriterRound(oracles=self._oracles, effort=self._effort, **arguments)
        verdict = one.run()
        self.tick()
        counted = {"compared": verdict.rows, "lost": verdict.lost, "doubled": verdict.doubled, "mixed": verdict.mixed}
        self.totals.rows.update(counted)
        return verdict.differences

    def _prepare_ray(self):
        """Makes models and documents, and the store that the undisturbed job makes from them."""
        if self._ray_oracle is None:
            folder = self._folder / "undisturbed-ray"
            folder.mkdir()
            self._command = make_command(folder)
            url = str(folder / "cache.zarr")
            RayRound(command=self._command, oracle=None, url=url, options=None, direct=None, folder=folder, seed=0,
                     totals=Totals(), tick=self.tick, quiet=lambda: None).undisturbed()  # fmt: skip
            self._ray_oracle = Oracle([url])

    def tick(self):
        """Updates the counts and shows the progress of the run."""
        if self._bucket is not None:
            self._bucket.count()
        if sys.stderr.isatty() and time.monotonic() > self._next_line:
            self._next_line = time.monotonic() + 0.5
            print(f"\r{self.line()}\x1b[K", end="", file=sys.stderr, flush=True)

    def line(self):
        """Returns one line with the progress of the run."""
        totals = self.totals
        wrong = sum(totals.rows[name] for name in ("lost", "doubled", "mixed"))
        return (
            f"{(time.monotonic() - self._started) / 60:.1f} of {self._minutes:g} min, {totals.rounds.total()} rounds, "
            f"{totals.kills.total():,} kills, {totals.faults.total():,} faults, {totals.requests:,} requests, "
            f"{totals.rows['compared']:,} rows compared, {wrong} wrong"
        )

    @staticmethod
    def _say(text):
        print(f"\r{text}\x1b[K" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


def keep(url, options, folder):
    """Copies a store from the bucket to a folder, because the bucket is deleted at the end."""
    for path, data in snapshot(url, options).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)


def make_oracles(folder):
    """Writes one undisturbed store for each variant. Returns their oracles, without and with an append.

    A single writer writes each of them, and is not killed.
    """
    urls = [f"{folder}/undisturbed-{variant}" for variant in range(rows.VARIANTS)]
    for variant, url in enumerate(urls):
        job = writing.Job(url=url, options=None, seed=0, variant=variant, append=False, threads=1, again=False,
                          log=f"{folder}/undisturbed.log")  # fmt: skip
        writing.write_all(job)
        shutil.copytree(url, f"{url}-appended")
        writing.write_all(replace(job, url=f"{url}-appended", append=True))
    return Oracle(urls), Oracle([f"{url}-appended" for url in urls])


def start_forkserver():
    """Starts the process that imports the modules of all writers once."""
    FORKSERVER.set_forkserver_preload(["benchmarks._torture_run"])
    # Killed writers leave semaphores of numcodecs behind, for which the resource tracker would print warnings.
    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = "ignore"
    resource_tracker.ensure_running()
    del os.environ["PYTHONWARNINGS"]
    if before is not None:
        os.environ["PYTHONWARNINGS"] = before


def torture(folder, *, minutes, seed, kinds, effort=1.0):
    """Runs rounds for some minutes, and at least one round of each kind.

    Args:
        folder: Folder for all files. Those of a round whose store differs are kept.
        minutes: Time after which no further round starts.
        seed: Seed of all draws.
        kinds: Kinds of rounds, some of SHARES.
        effort: Relative length of the rounds with plain writers.

    Returns:
        The totals.
    """
    start_forkserver()
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # hides warnings of the proxy about killed clients
    with contextlib.ExitStack() as stack:
        run = Run(folder, stack, minutes=minutes, seed=seed, kinds=kinds, effort=effort)
        run.run()
    return run.totals
