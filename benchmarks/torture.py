"""Kills the processes that write a store repeatedly, and compares the result with an undisturbed store.

    python -m benchmarks.torture --minutes 20 [--seed 1] [--kinds local s3 ray-local ray-s3]

Each round makes a new store. In `local` and `s3` rounds, several plain processes write each shard, and are killed with
SIGKILL or stopped for a while at random moments. Shards are taken back, objects are damaged and repaired, documents are
appended, and another process reads meanwhile. In `ray-local` and `ray-s3` rounds jobs/dump_logits.py writes the store:
its actors, its driver or all its processes are killed, and a second job is started beside it. The bucket is on a real
S3 server behind a proxy that injects errors, resets, slow bodies, and lost responses to completed requests.

A finished store must equal the undisturbed one: every object byte for byte, commit records except for their times and
writers, and no files in staging. If one differs, the exit status is 1 and its folder is kept.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time

from benchmarks._torture_run import SHARES, torture

KILLED = {"writer": "writers", "driver": "drivers", "actor": "actors", "other of a Ray": "others of a Ray"}
ROWS = ("compared", "read meanwhile", "lost", "doubled", "mixed")


def table(totals, seconds):
    """Returns the table of all actions and findings."""

    def line(what, counts):
        detail = ", ".join(f"{name} {n:,}" for name, n in sorted(counts.items(), key=lambda item: -item[1]) if n)
        return f"{what:<24}{round(counts.total()):>12,}  {detail}".rstrip()

    times = {name: round(value) for name, value in totals.seconds.items()}
    lines = [
        line("rounds", totals.rounds),
        f"{'kills':<24}{totals.kills.total():>12,}",
        *(f"{'  ' + KILLED[kind]:<24}{n:>12,}" for kind, n in totals.kills.items()),
        line("  writers killed at", totals.steps),
        line("faults", totals.faults),
        f"{'requests':<24}{totals.requests:>12,}",
        line("processes started", totals.started),
        *(f"{'  ' + name:<40}{n:>8,}" for name, n in sorted(totals.events.items())),
        *(f"{'rows ' + name:<24}{totals.rows[name]:>12,}" for name in ROWS),
        f"{'differences in all':<24}{len(totals.differences):>12,}",
        f"{'seconds':<24}{seconds:>12,.0f}  {', '.join(f'{name} {n}' for name, n in times.items())}",
    ]
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, required=True, help="no round begins after so long")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn; moments differ all the same")
    parser.add_argument("--kinds", nargs="+", choices=tuple(SHARES), default=tuple(SHARES))
    args = parser.parse_args(argv)
    started = time.monotonic()
    folder = tempfile.mkdtemp(prefix="torture-")
    totals = torture(folder, minutes=args.minutes, seed=args.seed, kinds=args.kinds)
    print(table(totals, time.monotonic() - started))
    if totals.differences:
        raise SystemExit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
