"""What a dump could not compute, as lines for people."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any

from logitstore.layers import runs, spans

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

MOST_LINES = 20
"""Of shards, and of documents; more are counted."""


def explain(summary: dict[str, Any]) -> int:
    """Prints what a dump left undone, and how to go on, to stderr.

    Args:
        summary: What the job's `main` returned.

    Returns:
        The exit status: 3 if anything was set aside.
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
    for layer, numbers in summary.get("stale", {}).items():
        again = (
            "run the same command again"
            if layer in summary["layers"]
            else f"give --reference {layer.removeprefix('losses/')}=MODEL to compute them again"
        )
        _say("note: ", [f"{layer}: shards {spans(runs(numbers))} were computed from what is there no more; {again}"])
    if not shards and not num_documents:
        return 0
    counts = {"shards": len(shards), "documents": num_documents}
    what = " and ".join(f"{num:,} {name}" for name, num in counts.items() if num)
    ways = {"shards": "to try the shards again", "documents": "with --retry_set_aside to try the documents again"}
    how = ", or ".join(way for name, way in ways.items() if counts[name])
    _say("error: ", [f"{what} were set aside, all others are done; run the same command {how}"])
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
