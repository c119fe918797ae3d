"""Reads a store while other processes write it: open, `info` and `verify` must work, and the counts may only grow."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys

import logitstore
from logitstore.commands import main as cli
from logitstore.errors import StoreNotFoundError


class Watch:
    """Reads a store repeatedly.

    Attributes:
        seen: The counts of the last look; empty before the store exists.
        partial: Number of looks at which some layer had some of its shards and not all.
    """

    def __init__(self, url, options=None, flags=()):
        self.url, self.options, self.flags = url, options, flags
        self.seen = {}
        self.partial = 0

    def look(self):
        """Opens, describes and verifies the store, if it exists."""
        try:
            store = logitstore.open(self.url, self.options)
        except StoreNotFoundError:
            assert self.seen == {}
            return
        self._grows(counts(store))
        facts = json.loads(self._command("info", "--json"))
        self._grows(
            {"documents": facts["documents"], "rows": facts["rows"], "shards": facts["shards"]}
            | {name: layer["shards"] for name, layer in facts["layers"].items()}
        )
        is_partial = any(0 < self.seen[layer] < self.seen["shards"] for layer in store.layers)
        self.partial += is_partial
        if is_partial and self.partial == 1:
            self._in_a_process("info")
            self._in_a_process("verify")
        elif self.partial % 2:
            assert ": all are as committed" in self._command("verify")
        else:
            assert logitstore.verify(store) == []

    def _grows(self, now):
        """Checks that no count has become smaller."""
        assert {name: number for name, number in self.seen.items() if now.get(name, -1) < number} == {}, now
        self.seen = now

    def _command(self, *arguments):
        """Runs `logitstore` in this process, and returns its output."""
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            status = cli.main([*arguments, self.url, *self.flags])
        assert status == 0, printed.getvalue()
        return printed.getvalue()

    def _in_a_process(self, *arguments):
        """Runs `logitstore` in a process of its own."""
        run = [sys.executable, "-m", "logitstore.commands.main", *arguments, self.url, *self.flags]
        done = subprocess.run(run, capture_output=True, text=True, check=False)
        assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stdout + done.stderr


def counts(store):
    """Returns the number of documents, rows and shards of a store, and of committed shards of each layer."""
    return {"documents": store.num_documents, "rows": store.num_rows, "shards": store.spec.num_shards} | {
        name: len(layer.index.upto(store.spec.num_shards)) for name, layer in store.layers.items()
    }
