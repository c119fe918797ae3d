"""What a dump could not compute, as lines for people."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any

from logitstore.store.catalog import runs, spans

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

MOST_LINES = 20
"""Of shards, and of documents; more are counted."""


def explain(summary: dict[str, Any]) -> int:
    """Prints what a dump left undone, and how to go on, to stderr.

    Args:
        summary: What the job's `main` returned.

    Returns:
        The exit status: 3 if anything was set aside, or one of the job's own layers lacks something again.
    """
    left = summary.get("set_aside", {"shards": {}, "documents": {}})
    shards = [f"shard {shard}: {reason}" for shard, reason in left["shards"].items()]
    documents = [
        f"document {number} of {layer}: {reason}"
        for layer, named in left["documents"].items()
        for number, reason in named.items()
    ]
    num_documents = sum(summary.get("documents_set_aside", {}).values())
    _say("set aside: ", _shortened(shards, len(shards)))
    _say("set aside: ", _shortened(documents, num_documents))
    undone: set[int] = set()
    for layer, numbers in summary.get("stale", {}).items():
        again = "run the same command again"
        if layer in summary["layers"]:
            undone.update(numbers)
        else:
            again = f"give --reference {layer.removeprefix('losses/')}=MODEL to compute them again"
        _say("note: ", [f"{layer}: shards {spans(runs(numbers))} were computed from what is there no more; {again}"])
    for layer, numbers in summary.get("missing", {}).items():
        undone.update(numbers)
        _say("note: ", [f"{layer}: shards {spans(runs(numbers))} were taken back; run the same command again"])
    undone.difference_update(map(int, left["shards"]))
    if undone:
        _say("error: ", [f"{len(undone):,} shards were taken back meanwhile, or what they are computed from was, by "
                         "another job or a repair; run the same command again to compute them"])  # fmt: skip
    if not shards and not num_documents:
        return 3 if undone else 0
    counts = {"shards": len(shards), "documents": num_documents}
    what = " and ".join(f"{num:,} {name}" for name, num in counts.items() if num)
    ways = {"shards": "to try the shards again", "documents": "with --retry_set_aside to try the documents again"}
    how = ", or ".join(way for name, way in ways.items() if counts[name])
    others = "" if undone else ", all others are done"
    _say("error: ", [f"{what} were set aside{others}; run the same command {how}"])
    return 3


def _shortened(lines: list[str], total: int) -> Iterator[str]:
    shown = lines[:MOST_LINES]
    yield from shown
    if total > len(shown):
        yield f"and {total - len(shown):,} more"


def _say(prefix: str, lines: Iterable[str]) -> None:
    """Prints lines, each as one, without what a store from elsewhere could make a terminal do."""
    for line in lines:
        print(prefix + re.sub(r"[^\x20-\x7e\xa0-\ud7ff\ue000-\U0010ffff]+", " ", line), file=sys.stderr)
