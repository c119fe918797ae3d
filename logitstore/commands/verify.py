"""`logitstore verify`: reads all committed bytes of a store and compares them with the commit records.

Exit status 1 if anything is damaged. With --repair, damaged and stale shards are uncommitted: the next dump writes
only these shards again.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from tqdm import tqdm

from logitstore.commands.shared_options import Parser, add_no_progress, add_storage_options, add_switch
from logitstore.commands.user_errors import command, leave, say, user_errors
from logitstore.inspection import info
from logitstore.inspection.verify import check_num_threads, places, repair, verify
from logitstore.storage.options import storage_options
from logitstore.storage.storage import Storage
from logitstore.store.reader import Store

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from logitstore.inspection.metadata import Problem

MOST_NAMED = 20
"""Maximum number of shards that are listed after a repair."""


def parser() -> Parser:
    """Returns the parser of the command line."""
    p = Parser(prog="logitstore verify", description=__doc__)
    p.add_argument("url", metavar="URL", help="folder or fsspec URL of the store")
    add_storage_options(p)
    add_switch(p, "--repair", "uncommit damaged and stale shards, so that the next dump writes them again, and give up "
               "an unfinished append")  # fmt: skip
    p.add_argument(
        "--num_threads", type=int, default=4, help="number of shards read at the same time. Default: %(default)s"
    )
    p.add_argument("--sample", type=float, default=1.0, metavar="SHARE",
                   help="read only this share of each layer's shards, such as 0.01. Default: all")  # fmt: skip
    p.add_argument("--seed", type=int, default=0, help="seed that chooses the shards of a sample. Default: %(default)s")
    add_no_progress(p)
    return p


@command("verify only reads; a repair that was stopped is finished by running the same command again")
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns its exit status: 0 on success, 1 if there is damage, 2 if the arguments are wrong."""
    with user_errors():
        args = parser().parse_args(argv)
        check_num_threads(args.num_threads)  # `verify` checks this too, but only after the bar was drawn.
        store = Store(Storage(args.url, storage_options(args.storage_options)))
        total = len(places(store, args.sample, args.seed))
        # In a log file, where each update of the bar is kept, the bar is updated less often than in a terminal.
        with tqdm(
            total=total, desc="verify", unit="shard", leave=False, disable=args.no_progress,
            mininterval=0.5 if sys.stderr.isatty() else 10,
        ) as bar:  # fmt: skip
            problems = verify(
                store, sample=args.sample, seed=args.seed, num_threads=args.num_threads, progress=bar.update
            )
        say(str(problem) for problem in problems)
        say(info.unfinished(store))
        say(_summary(store, problems, total))
        if args.repair:
            say(_repaired(store, problems))
        elif any(problem.shard is not None or problem.path is not None for problem in problems):
            say([f"run `logitstore verify --repair {store.url}`, then the dump again: it writes only what is missing"])
    return 1 if problems else 0


def _summary(store: Store, problems: list[Problem], total: int) -> Iterable[str]:
    committed = sum(len(layer.index.upto(store.spec.num_shards)) for layer in store.layers.values())
    read = f"{total:,} committed shards" if total == committed else f"{total:,} of {committed:,} committed shards"
    wrong = sum(problem.shard is not None for problem in problems)
    found = f"{wrong:,} are not as committed" if wrong else "all are as committed"
    besides = f"; other problems: {len(problems) - wrong:,}" if len(problems) > wrong else ""
    yield f"read {read}: {found}{besides}"


def _repaired(store: Store, problems: list[Problem]) -> Iterable[str]:
    """Repairs the store. Yields lines about the repairs, about problems that remain, and about how to continue."""
    yield from (f"repaired: {line}" for line in repair(store, problems))
    if left := dict.fromkeys(p.layer for p in problems if p.shard is None and p.path is None):
        yield f"not repaired: the problems of {', '.join(left)} that are listed above"
    if shards := [f"{problem.layer}/{problem.shard}" for problem in problems if problem.shard is not None]:
        more = f" and {len(shards) - MOST_NAMED:,} more" if len(shards) > MOST_NAMED else ""
        written = ", ".join(shards[:MOST_NAMED]) + more
        yield f"next: run each dump of this store again with the same options; the dumps write {written}"
        if any(problem.layer == "tokens" and problem.shard is not None for problem in problems):
            yield "      add --data, because shards of the layer tokens must be written again"


if __name__ == "__main__":
    leave(main())
