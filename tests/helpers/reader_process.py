"""A separate process that reads whole stores for a test, so that a crash, a hang or too much memory is reported.

The process may use LIMIT_BYTES more than it has after its imports. Every warning is an error in it.
"""

from __future__ import annotations

import contextlib
import io
import json
import resource
import selectors
import subprocess
import sys
import time
import traceback

from tests.helpers.paths import environment

LIMIT_BYTES = 1_500_000_000
MOST_SHARDS = 4
"""Number of shards that are read. A hostile store may claim millions."""


class ReaderProcess:
    """The test's side of the connection to the process."""

    def __init__(self):
        self._process = None

    def read(self, url, *, steps=None, seconds=20.0):
        """Returns the outcomes of `read_everything`. Fails if the process took more than `seconds`, or crashed."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "error", __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment(),
            )
            self._answer(120.0)
        self._process.stdin.write(json.dumps([str(url), steps]) + "\n")
        self._process.stdin.flush()
        return self._answer(seconds)

    def _answer(self, seconds):
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(seconds):
                self.close()
                raise AssertionError(f"reading took more than {seconds} s")
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self.close()
            raise AssertionError(f"reading ended the process with status {status}")
        return json.loads(line)

    def close(self):
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def read_everything(url, steps=None):
    """Runs every operation that reads a store.

    Returns:
        The outcome of each step: "" for success, the class and message of a LogitStoreError, the exit status and
        output of a command, or "BAD" and a traceback. The key "seconds" holds the processor time.
    """
    import logitstore
    from logitstore.commands import main as cli
    from logitstore.errors import LogitStoreError
    from trainer.data.dataset import DocumentDataset

    outcomes = {}
    started = time.process_time()

    def step(name, action):
        if steps is not None and name not in steps and name != "open":
            return None
        try:
            value = action()
        except SystemExit as error:
            outcomes[name] = f"exit {error.args[0]} {error.args[1]}"
        except LogitStoreError as error:
            outcomes[name] = f"{type(error).__name__}: {error}"
        except BaseException:  # noqa: BLE001 - any other exception is a fault that the test must report
            outcomes[name] = f"BAD {traceback.format_exc()[-2000:]}"
        else:
            outcomes[name] = ""
            return value
        return None

    store = step("open", lambda: logitstore.open(url))
    for command in ("info", "verify"):
        step(command, lambda command=command: command_line(cli, command, url))
    if store is not None:
        step("documents", store.documents)
        for shard in range(min(store.num_shards, MOST_SHARDS)):
            step(f"shard {shard}", lambda shard=shard: use(store.read_shard(shard)))
        for name in list(store.spec.losses)[:2]:
            step(f"loss {name}", lambda name=name: store.loss(name)[0] if len(store) else None)
        if len(store):
            for document in (0, len(store) // 2, len(store) - 1):
                step(f"document {document}", lambda document=document: store[document])
            step("dataset", lambda: use_dataset(DocumentDataset([store])))
            if store.spec.losses:
                losses = {"reference_ce": min(store.spec.losses)}
                columns = {"columns": ["reference_ce"], "losses": losses}
                step("dataset of losses", lambda: use_dataset(DocumentDataset([store], **columns)))
    outcomes["seconds"] = time.process_time() - started
    return outcomes


def command_line(cli, command, url):
    """Runs the command, and checks that its output has no control characters."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = cli.main([command, url])
    said = out.getvalue() + err.getvalue()
    said.encode()
    if any(ord(c) < 32 and c not in "\n\r" for c in said):
        raise AssertionError(f"control characters in {said[:500]!r}")
    if status:
        raise SystemExit(status, said)


def use(shard):
    """Uses the numbers as a reader does, and checks that they are finite."""
    import numpy as np

    if shard.rows is not None:
        if not np.isfinite(shard.rows.logprobs).all():
            raise AssertionError("logprobs that are not finite")
        shard.rows.padded(np.flatnonzero(shard.loss_mask))
    for ce in shard.losses.values():
        if not np.isfinite(ce[shard.loss_mask]).all():
            raise AssertionError("losses that are not finite")
    for i in range(min(len(shard), 3)):
        shard.document(i)


def use_dataset(dataset):
    epoch = dataset.order.epoch(0)
    dataset.collator()([dataset[epoch[0]], dataset[epoch[len(epoch) - 1]]])


def main():
    answers = sys.stdout
    sys.stdout = sys.stderr  # only answers may be written to the pipe
    read_everything("memory://nothing/there")
    with open("/proc/self/statm") as file:
        baseline = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (baseline + LIMIT_BYTES,) * 2)
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        url, steps = json.loads(line)
        print(json.dumps(read_everything(url, steps)), file=answers, flush=True)


if __name__ == "__main__":
    main()
