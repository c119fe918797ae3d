"""Ctrl-C: every command ends with status 130 and one line that names the next step."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import threading

import pytest

from logitstore.commands.user_errors import command


def interrupted(argv, tmp_path, when):
    """Runs a command in a terminal's process group, and interrupts it when its output matches a pattern."""
    # Under nohup, or in the background of a script, the tests ignore SIGINT, and would hand that on to the command.
    listens = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    with subprocess.Popen(
        [sys.executable, "-c", listens + "from logitstore.commands.main import console; console()", *argv],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"RAY_ADDRESS": "local", "HF_DATASETS_CACHE": str(tmp_path)},
    ) as process:  # fmt: skip
        killer = threading.Timer(120, process.kill)
        killer.start()
        said = ""
        while not re.search(when, said) and (character := process.stderr.read(1)):
            said += character
        os.killpg(process.pid, signal.SIGINT)
        after = process.stderr.read()
        process.wait()
        killer.cancel()
    return process.returncode, said + after


@pytest.mark.parametrize("when", ["Writing tokens", "loading models", "dump:"])
def test_interrupted_dump_ends_with_one_line_and_keeps_what_is_finished(when, tiny, tmp_path):
    argv = ["dump", "--store", str(tmp_path / "c.zarr"), "--target", tiny.target, "--data", tiny.data]
    argv += ["--num_proc", "1"]
    status, text = interrupted(argv, tmp_path, when)
    assert status == 130, text
    assert "Traceback" not in text
    lines = [line for line in text.splitlines() if line.startswith("stopped: ")]
    assert lines == ["stopped: finished shards are kept; run the same command again to go on"]
    assert text.endswith(lines[0] + "\n")


def test_interrupted_training_ends_with_one_line_and_keeps_its_checkpoints(tiny, tiny_store, tmp_path):
    argv = ["train", "--store", tiny_store, "--draft", tiny.draft, "--output_dir", str(tmp_path / "out"), "--use_cpu"]
    argv += ["--max_steps", "100000", "--save_steps", "2", "--per_device_train_batch_size", "2"]
    status, text = interrupted(argv, tmp_path, r" [4-9]/100000| \d\d+/100000")
    assert status == 130, text
    assert "Traceback" not in text
    last = text.rstrip().splitlines()[-1]
    assert last.startswith("stopped: finished checkpoints are kept; run the same command with ")
    assert list((tmp_path / "out").glob("checkpoint-*"))


def test_interrupts_exits_and_closed_pipes_become_statuses(capsys):
    def raising(error):
        @command("nothing is lost")
        def main(argv=None):
            raise error

        return main

    assert raising(KeyboardInterrupt())() == 130
    assert capsys.readouterr().err == "\nstopped: nothing is lost\n"
    # Libraries raise errors of their own while they clean up after Ctrl-C.
    during_cleanup = TimeoutError()
    during_cleanup.__context__ = KeyboardInterrupt()
    assert raising(during_cleanup)() == 130
    with pytest.raises(TimeoutError):
        raising(TimeoutError())()
    assert raising(SystemExit(3))() == 3
    with pytest.raises(SystemExit, match="text"):
        raising(SystemExit("text"))()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_output_that_cannot_be_written_is_one_line(tiny_store):
    """A full disk behind stdout is reported, and closed streams are not used."""
    command = [sys.executable, "-m", "logitstore.commands.main", "info", tiny_store]
    with open("/dev/full", "w") as full:
        run = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr == "error: the output cannot be written to stdout (No space left on device)\n"
    for closed, status in ((">&-", 0), ("2>&-", 0)):
        shell = subprocess.run(
            f"{shlex.join(command)} {closed}", shell=True, capture_output=True, text=True, check=False
        )
        assert (shell.returncode, shell.stderr) == (status, "")
