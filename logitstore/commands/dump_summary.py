"""Formats the result of a dump as text: shards and bytes written, shards and documents set aside, the next command."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any

from logitstore.store.catalog import runs, spans

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

MOST_LINES = 20
"""Maximum number of shards, and of documents, that are listed as set aside. The others are only counted."""


def render(summary: dict[str, Any], target: str | None) -> Iterator[str]:
    """Yields lines about the shards, rows and bytes that a dump wrote, and the next command.

    Args:
        summary: The figures that the dump returned.
        target: Name of the target that the dump ran; None if it ran no target.
    """
    store = summary["store"]
    yield (
        f"{store}: {summary['documents']:,} documents, {summary['store_rows']:,} rows of which "
        f"{summary['counted_rows']:,} count"
    )
    if "layers" not in summary:
        yield f"next: logitstore dump --store {store} --target MODEL"
        return
    shards = f"{summary['shards_done']:,} shards written, {summary['shards_skipped']:,} existed already"
    if summary["rows"]:
        rate = f"{summary['rows']:,} rows in {summary['seconds']:.1f} s, {summary['rows_per_second']:,.0f} rows/s"
        shards = f"{shards}; {rate}"
    yield f"  {shards}"
    width = max(map(len, summary["layers"]))
    for layer in summary["layers"]:
        size, a_row = summary["bytes"][layer], summary["bytes_per_counted_row"][layer]
        yield f"  {layer:<{width}}  {a_row:8.2f} bytes a counted row  {size / 1e6:10,.1f} MB"
    left = len(summary["set_aside"]["shards"]), sum(summary["documents_set_aside"].values())
    if any(left) or summary["stale"] or summary["missing"]:
        return  # In this case `explain` prints the next command.
    yield f"  {left[0]} shards and {left[1]} documents set aside"
    if target is None:
        name = summary["layers"][0].removeprefix("losses/")
        yield (
            f"next: logitstore train --store {store} --draft MODEL --output_dir DIR "
            f"--selection adaspec --reference {name}"
        )
    else:
        yield f"next: logitstore fidelity {store}"
        yield f"      logitstore train --store {store} --draft MODEL --output_dir DIR"


def explain(summary: dict[str, Any]) -> int:
    """Prints to stderr the shards and documents that a dump did not complete, and how to continue.

    Args:
        summary: The figures that the dump returned.

    Returns:
        The exit status: 3 if anything was set aside, or if shards of the dumped layers were taken back or became stale;
        0 otherwise.
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
        _say(
            "note: ",
            [f"{layer}: shards {spans(runs(numbers))} were computed from values that no longer exist; {again}"],
        )
    for layer, numbers in summary.get("missing", {}).items():
        undone.update(numbers)
        _say("note: ", [f"{layer}: shards {spans(runs(numbers))} were taken back; run the same command again"])
    # Shards that were set aside have their own message below.
    undone.difference_update(map(int, left["shards"]))
    if undone:
        _say("error: ", [f"another job or a repair took back {len(undone):,} shards during the dump, or shards that "
                         "they are computed from; run the same command again"])  # fmt: skip
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
    """Prints lines to stderr, without the control characters that text from an untrusted store may contain."""
    for line in lines:
        print(prefix + re.sub(r"[^\x20-\x7e\xa0-\ud7ff\ue000-\U0010ffff]+", " ", line), file=sys.stderr)
