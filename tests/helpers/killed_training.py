"""Kills a training run while it writes a checkpoint, resumes it, and compares the result with an uninterrupted run.

Usage: killed_training.py STORE DRAFT FOLDER STRIDE. Prints a JSON list with one entry for each kill.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path

STEPS = 3


def main(store, draft, folder, stride):
    import torch  # noqa: F401 - imported once here for all child processes
    import transformers  # noqa: F401

    import trainer

    events = count(store, draft, Path(folder, "whole"))
    expected = final(Path(folder, "whole"))
    first = next(i for i, event in enumerate(events) if "checkpoint-2" in event)  # checkpoint-1 is finished by then
    found = []
    for kill_at in range(1, len(events) + 1, stride):
        output = Path(folder, str(kill_at))
        killed = in_child(run, store, draft, output, kill_at=kill_at)
        left = trainer.loop.checkpoints.finished(output)
        ended = in_child(run, store, draft, output, resume=str(left[-1]) if left else None)
        found.append({
            "event": events[kill_at - 1], "killed": killed == -signal.SIGKILL, "left": [path.name for path in left],
            "may_be_lost": kill_at <= first, "ended": ended, "same": ended == 0 and final(output) == expected,
        })  # fmt: skip
    print(json.dumps(found))  # noqa: T201


def in_child(action, *args, **kwargs):
    """Runs an action in a forked process. Returns its exit status, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        try:
            action(*args, **kwargs)
        except BaseException:  # noqa: BLE001 - a child must not continue with the code of its parent
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run(store, draft, output, *, kill_at=None, resume=None, events=None):
    from tests.helpers.training import train

    counted = 0

    def hook(event, args):
        nonlocal counted
        if event not in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            return
        path, *rest = (os.fsdecode(arg) if isinstance(arg, bytes | os.PathLike) else arg for arg in args)
        is_write = event != "open" or (isinstance(rest[0], str) and set(rest[0]) & set("wax+"))
        if not (isinstance(path, str) and "checkpoint-" in path and str(output) in path and is_write):
            return
        counted += 1
        if events is not None:
            events.write(f"{event} {os.path.relpath(path, output)}\n")
        if counted == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    train(store, draft, output, resume=resume, max_steps=STEPS, save_total_limit=1, logging_steps=1)


def count(store, draft, output):
    """Runs a training without interruption. Returns the changes of its checkpoint files, in order."""
    output.mkdir(parents=True)

    def action():
        with (output / "events.txt").open("w") as file:
            run(store, draft, output, events=file)

    if in_child(action):
        raise AssertionError("a run that nobody killed must end well")
    return (output / "events.txt").read_text().splitlines()


def final(output):
    return Path(output, f"checkpoint-{STEPS}", "model.safetensors").read_bytes()


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]))
