"""Shared parts of the tests with hostile stores: invalid contents, the expected outcomes, and their check.

Every store is read by another process with 1.5 GB of memory: opening, `info`, `verify`, shards, documents, and a
trainer's dataset. Each step must succeed or raise a LogitStoreError, and must be fast; anything else fails the test.
"""

from __future__ import annotations

import re
from pathlib import Path

MOST_SECONDS = 2.0
"""Limit of processor time for all steps on one store, ten times the usual time."""


def check(reader, url, expected, *, seconds=MOST_SECONDS, steps=None):
    """Reads a store in every way and compares the outcomes with the expected ones.

    Args:
        reader: The process that reads.
        url: The store.
        expected: By step, a pattern for the beginning of its outcome; "" for success.
        seconds: Limit of processor time for all steps.
        steps: The steps to run besides opening; all by default.
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
    """Returns the outcomes to expect if opening the store is refused."""
    return {"open": rf"FormatError: .*{message}", "info": "exit 2", "verify": "exit 2"}


def damaged(message, error="DamagedShardError"):
    """Returns the outcomes to expect if only shard 1 is refused."""
    shard = rf"{error}: shard 1 .*{message}"
    return {"open": "", "info": "", "verify": "exit 1", "shard 0": "", "shard 1": shard, "shard 2": ""}


def listing(folder):
    """Returns every file below a folder with the time of its last change."""
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
"""Contents that are invalid for every file of a store."""
