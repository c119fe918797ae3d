"""The rounds of a torture run, one after the other, and what they share: the bucket and the undisturbed stores."""

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
from tests.faults import KINDS, FaultyProxy, S3Server, s3_options

SHARES = {"local": 0.08, "s3": 0.45, "ray-local": 0.2, "ray-s3": 0.27}
"""Of the time, by kind of round."""

RATES = {"s3": (0.1, 0.2, 0.3), "ray-s3": (0.1, 0.15)}
"""Shares of the requests that fail: a job writes its tokens one after the other, and waits after most faults."""


class Bucket:
    """An S3 server, and the proxy that makes it fail."""

    def __init__(self, stack, seed, totals):
        self._server = stack.enter_context(S3Server())
        self._proxy = stack.enter_context(FaultyProxy(self._server.url, seed=seed))
        self._totals = totals
        self.direct = s3_options(self._server.url)

    def begin(self, name, rng, rates):
        """Makes an empty bucket, and draws how it fails; returns the options by which writers reach it."""
        self._server.reset()
        self._server.make_bucket(name)
        kinds = KINDS if rng.random() < 0.6 else rng.sample(KINDS, 2)
        self._proxy.set(rate=rng.choice(rates), kinds=kinds)
        options = s3_options(self._proxy.url)
        if rng.random() < 0.5:  # else botocore hides most faults from this package
            options["config_kwargs"] = {"retries": {"max_attempts": 1}}
        return options

    def quiet(self):
        """Waits until nothing is under way any more that killed writers asked for."""
        while self._proxy.busy:
            time.sleep(0.01)

    def count(self):
        """Brings the totals up to date."""
        self._totals.requests = self._proxy.requests
        self._totals.faults.update({kind: n - self._totals.faults[kind] for kind, n in self._proxy.faults.items()})


class Run:
    """Rounds of several kinds, until the time is over."""

    def __init__(self, folder, stack, *, minutes, seed, kinds, effort):
        self._folder, self._minutes, self._seed, self._kinds = Path(folder), minutes, seed, kinds
        self._effort = effort
        self._started, self._next_line = time.monotonic(), 0.0
        self.totals = Totals()
        self._bucket = Bucket(stack, seed, self.totals) if any("s3" in kind for kind in kinds) else None
        self._oracles = self._command = self._ray_oracle = None

    def run(self):
        """Returns whether no store differed; the folder of one that does is kept."""
        while time.monotonic() - self._started < 60 * self._minutes or len(self.totals.rounds) < len(self._kinds):
            # The kind that has had least of its share so far.
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
        """Runs one round; returns how its store differs."""
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
        """Makes models and documents, and the store that the job makes of them if nobody disturbs it."""
        if self._ray_oracle is None:
            folder = self._folder / "undisturbed-ray"
            folder.mkdir()
            self._command = make_command(folder)
            url = str(folder / "cache.zarr")
            RayRound(command=self._command, oracle=None, url=url, options=None, direct=None, folder=folder, seed=0,
                     totals=Totals(), tick=self.tick, quiet=lambda: None).undisturbed()  # fmt: skip
            self._ray_oracle = Oracle([url])

    def tick(self):
        """Counts, and says where the run is."""
        if self._bucket is not None:
            self._bucket.count()
        if sys.stderr.isatty() and time.monotonic() > self._next_line:
            self._next_line = time.monotonic() + 0.5
            print(f"\r{self.line()}\x1b[K", end="", file=sys.stderr, flush=True)

    def line(self):
        """Says in one line where the run is."""
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
    """Copies a store out of a bucket that will be gone."""
    for path, data in snapshot(url, options).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)


def make_oracles(folder):
    """Writes the undisturbed stores, one for each variant; returns their oracles, without and with an append.

    Nobody else is there, and nobody is killed.
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
    """Starts the process that imports once what all writers need."""
    FORKSERVER.set_forkserver_preload(["benchmarks._torture_run"])
    # Killed writers leave semaphores of numcodecs behind, which the tracker would list in the end.
    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = "ignore"
    resource_tracker.ensure_running()
    del os.environ["PYTHONWARNINGS"]
    if before is not None:
        os.environ["PYTHONWARNINGS"] = before


def torture(folder, *, minutes, seed, kinds, effort=1.0):
    """Tortures for some minutes, and at least one round of each kind.

    Args:
        folder: For everything; what is in it of a round whose store differs is kept.
        minutes: No round begins after so long.
        seed: Of what is drawn.
        kinds: Some of SHARES.
        effort: How long rounds of writers are: kills and repairs of each.

    Returns:
        The totals.
    """
    start_forkserver()
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # the proxy writes to clients that were killed
    with contextlib.ExitStack() as stack:
        run = Run(folder, stack, minutes=minutes, seed=seed, kinds=kinds, effort=effort)
        run.run()
    return run.totals
