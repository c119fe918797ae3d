"""The `logitstore` command: plan a store, look at one, check one, export from one. Computing is done by the jobs."""

from __future__ import annotations

import json
import os
import re
import sys
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from logitstore.arguments import Parser
from logitstore.commands.plan_options import add_arguments
from logitstore.dump.planning.report import render
from logitstore.errors import LogitStoreError, MissingDriverError
from logitstore.inspection import export, fidelity_plot, fidelity_report, info, rerun
from logitstore.inspection.verify import check_num_threads, places, repair, verify
from logitstore.storage.options import storage_options
from logitstore.storage.storage import Storage
from logitstore.store.reader import Store

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable, Sequence

    from logitstore.inspection.metadata import Problem


NOBODY_READS = 141
"""Exit status of a command whose output nobody reads on, as shells have it: 128 and the number of SIGPIPE."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, 1 if `verify` found damage, 2 on a mistake, or NOBODY_READS."""
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes once more when it ends, and must not find nobody either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NOBODY_READS


def _run(argv: Sequence[str] | None) -> int:
    parser = _parser()
    try:
        args = parser.parse_args(argv)
        if args.command == "plan":
            return _plan(args)
        store = Store(Storage(args.url, storage_options(args.storage_options)))
        act = {"info": _info, "fidelity": _fidelity, "verify": _verify, "export": _export}[args.command]
        return act(store, args)
    except (LogitStoreError, ValueError) as error:
        print(f"error: {_plain(' '.join(str(error).split()))}", file=sys.stderr)
        return 2


def _parser() -> Parser:
    parser = Parser(prog="logitstore", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    show = commands.add_parser("info", help="what a store holds, how far it is, what it costs")
    show.add_argument("--json", action="store_true", help="print JSON instead of text")
    true = commands.add_parser("fidelity", help="how true it is to the target, by numbers measured when it was dumped")
    true.add_argument("--json", action="store_true", help="print JSON instead of a table")
    true.add_argument("--plot", metavar="FILE", help="draw bytes a row and kept mass, as .png or .svg")
    check = commands.add_parser("verify", help="read every committed byte; exit status 1 if any is not as committed")
    check.add_argument("--repair", action="store_true",
                       help="uncommit what is damaged or stale, so that the next dump writes it again, and give up an "
                       "unfinished append; exit status 1 if anything was wrong")  # fmt: skip
    check.add_argument("--num_threads", type=int, default=4, help="shards read at once (default %(default)s)")
    for command in (true, check):
        command.add_argument("--sample", type=float, default=1.0, metavar="SHARE",
                             help="read only this share of each layer's shards, such as 0.01")  # fmt: skip
        command.add_argument("--seed", type=int, default=0, help="which shards a sample holds (default %(default)s)")
    slice_of = commands.add_parser("export", help="a shard as padded NumPy arrays in an .npz file")
    slice_of.add_argument("--shard", type=int, required=True, metavar="N", help="which, from 0")
    slice_of.add_argument("--out", required=True, metavar="FILE.npz", help="file to write")
    add_arguments(commands.add_parser("plan", help="what a store will take before it is made"))
    for command in (show, true, check, slice_of):
        command.add_argument("url", metavar="URL", help="folder or fsspec URL of the store")
        command.add_argument("--storage_options", metavar="FILE", help="JSON file of fsspec options")
    return parser


def _plan(args: argparse.Namespace) -> int:
    try:
        from logitstore.dump.planning import survey  # torch and transformers: of this command alone
    except ImportError as error:
        raise MissingDriverError(
            f"plan must have the packages of the dump, got none ({error}); pip install 'logitstore[dump]'"
        ) from error
    return _show(survey.run(args), args, render)


def _export(store: Store, args: argparse.Namespace) -> int:
    _say(export.write(store, args.shard, args.out))
    return 0


def _info(store: Store, args: argparse.Namespace) -> int:
    return _show(info.describe(store), args, info.render)


def _fidelity(store: Store, args: argparse.Namespace) -> int:
    if args.plot is not None:
        fidelity_plot.check(args.plot)
    facts = fidelity_report.describe(store, sample=args.sample, seed=args.seed)
    _show(facts, args, fidelity_report.render)
    if args.plot is not None:
        fidelity_plot.draw(facts, args.plot)
    return 0


def _verify(store: Store, args: argparse.Namespace) -> int:
    check_num_threads(args.num_threads)  # a bar on the screen would stand before what is said of it
    total = len(places(store, args.sample, args.seed))
    with tqdm(
        total=total, desc="verify", unit="shard", mininterval=0.5 if sys.stderr.isatty() else 10, leave=False
    ) as bar:
        problems = verify(store, sample=args.sample, seed=args.seed, num_threads=args.num_threads, progress=bar.update)
    _say(str(problem) for problem in problems)
    _say(info.unfinished(store))
    _say(_summary(store, problems, total))
    if args.repair:
        _say(_repaired(store, problems))
    elif any(problem.shard is not None or problem.path is not None for problem in problems):
        _say(["`logitstore verify --repair` takes back what is damaged, and the next dump writes that again, no more"])
    return 1 if problems else 0


def _summary(store: Store, problems: list[Problem], total: int) -> Iterable[str]:
    committed = sum(len(layer.index.upto(store.spec.num_shards)) for layer in store.layers.values())
    read = f"{total:,} committed shards" if total == committed else f"{total:,} of {committed:,} committed shards"
    wrong = sum(problem.shard is not None for problem in problems)
    found = f"{wrong:,} are not as committed" if wrong else "all are as committed"
    besides = f"; problems besides: {len(problems) - wrong:,}" if len(problems) > wrong else ""
    yield f"read {read}: {found}{besides}"


def _repaired(store: Store, problems: list[Problem]) -> Iterable[str]:
    """Repairs, and says what was done, what could not be, and how to go on."""
    yield from (f"repaired: {line}" for line in repair(store, problems))
    if left := dict.fromkeys(p.layer for p in problems if p.shard is None and p.path is None):
        yield f"not repaired: what is said above of {', '.join(left)}"
    shards = [(problem.layer, problem.shard) for problem in problems if problem.shard is not None]
    if shards:
        numbers = ", ".join(f"{layer}/{shard}" for layer, shard in shards[:20])
        more = f" and {len(shards) - 20:,} more" if len(shards) > 20 else ""
        yield f"the dump, run again as it was run, writes {numbers}{more}, and no other shard that was committed:"
        yield from (f"  {command}" for command in rerun.commands(store, shards))


def _show(facts: dict[str, Any], args: argparse.Namespace, render: Callable[[dict[str, Any]], Iterable[str]]) -> int:
    """Prints what a command found, as JSON where that was asked for; returns the exit status."""
    if args.json:
        print(json.dumps(facts, indent=1))
    else:
        _say(render(facts))
    return 0


def _say(lines: Iterable[str]) -> None:
    """Prints lines, without what a store from elsewhere could make a terminal do."""
    for line in lines:
        print(_plain(line))


def _plain(text: str) -> str:
    return re.sub(r"[^\x20-\x7e\xa0-\ud7ff\ue000-\U0010ffff]", "?", " ".join(text.splitlines()))


if __name__ == "__main__":
    sys.exit(main())
