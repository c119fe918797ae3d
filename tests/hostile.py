"""What the tests of hostile stores share: a store to do harm to, a process that reads it, and what must come of it.

Every case is read by another process, which has 1.5 GB: opening, `info`, `verify`, shards, documents, and a trainer's
dataset. Whatever else than success or a LogitStoreError comes of a step fails the test, and so does taking long.
"""

from __future__ import annotations

import re
from pathlib import Path

MOST_SECONDS = 2.0
"""Of processor time, for everything that is done with one store: ten times what it takes."""


def check(reader, url, expected, *, seconds=MOST_SECONDS, steps=None):
    """Reads everything.

    Args:
        reader: The process.
        url: The store.
        expected: By step, a pattern that what it came to begins with; "" for success.
        seconds: Of processor time, for all steps.
        steps: Which steps besides opening; all by default.
    """
    outcomes = reader.read(url, steps=steps)
    spent = outcomes.pop("seconds")
    bad = {step: outcome for step, outcome in outcomes.items() if outcome.startswith("BAD")}
    assert not bad, "\n".join(f"{step}: {outcome}" for step, outcome in bad.items())
    for step, pattern in expected.items():
        if pattern:
            assert re.match(pattern, outcomes[step]), f"{step}: {outcomes[step]}"
        else:
            assert outcomes[step] == "", step
    assert spent < seconds
    return outcomes


def refused(message=""):
    """What it comes to if the store is refused as a whole."""
    return {"open": rf"FormatError: .*{message}", "info": "exit 2", "verify": "exit 2"}


def damaged(message, error="DamagedShardError"):
    """What it comes to if shard 1 alone is refused."""
    shard = rf"{error}: shard 1 .*{message}"
    return {"open": "", "info": "", "verify": "exit 1", "shard 0": "", "shard 1": shard, "shard 2": ""}


def listing(folder):
    """Every file below a folder, and when it was changed."""
    return {str(path): path.lstat().st_mtime_ns for path in Path(folder).rglob("*") if not path.is_dir()}


def deep(depth, opening="[", closing="]", inner=b"1"):
    return opening.encode() * depth + inner + closing.encode() * depth


FILES = {
    "empty": b"",
    "a pickle": b"\x80\x04\x95store.",
    "not UTF-8": b'{"zarr_format": 3, "node_type": "group", "attributes": {"\xff\xfe": 1}}',
    "deep lists": deep(10**6),
    "deep objects": deep(10**5, '{"a":', "}"),
    "as deep as a parser goes": deep(900),
    "a number": b"1",
    "a list": b"[]",
    "many small values": b"[" + b"[]," * 1_300_000 + b"1]",
    "zeros": bytes(10**6),
}
"""Contents that no file of a store has."""
