"""README's path from nothing to a finished job, on the installed Ray with its default settings."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import logitstore
from tests.helpers.paths import ROOT

BLOCK = re.compile(r"```bash from a fresh clone to a finished job\n(.*?)```", re.DOTALL)
LOOPBACK = "import fcntl, socket, struct; fcntl.ioctl(socket.socket(), 0x8914, struct.pack('16sh', b'lo', 0x41))"
"""Brings loopback up in a new network namespace (SIOCSIFFLAGS with IFF_UP and IFF_RUNNING)."""
ALONE = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
"""Network and processes of the test's own: default ports are free, and all that was started ends with it."""


@pytest.fixture
def checkout(tiny, tmp_path):
    """A copy of the checkout with what `make demo` would have made: a small target and its documents."""
    folder = tmp_path / "main"
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file() and not name.startswith("tests/data"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    shutil.copytree(tiny.target, folder / "build" / "demo" / "target")
    shutil.copy(tiny.data, folder / "build" / "demo" / "train.jsonl")
    return folder


@pytest.mark.long
@pytest.mark.timeout(400)
def test_commands_from_a_fresh_clone_to_a_finished_job_work_as_they_are(checkout, tmp_path):
    (block,) = BLOCK.findall((ROOT / "README.md").read_text())
    lines = block.splitlines()
    assert lines[:2] == ["make demo", ". .venv/bin/activate"]  # made and activated here by the fixture and by PATH
    script = "\n".join([f'"{sys.executable}" -c "{LOOPBACK}"', *lines[2:]])
    with tempfile.TemporaryDirectory(prefix="ray-") as short:  # sockets need a short path
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment |= {"HOME": str(tmp_path), "RAY_TMPDIR": short, "HF_DATASETS_CACHE": str(tmp_path / "datasets")}
        environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        alone = ALONE if os.getuid() == 0 else [*ALONE, "--user", "--map-root-user"]
        done = subprocess.run(
            [*alone, "bash", "-e", "-c", script], cwd=checkout, env=environment, capture_output=True, text=True,
            check=False, timeout=380,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "AuthenticationError" not in done.stdout + done.stderr
    assert (tmp_path / ".ray" / "auth_token").is_file()
    store = logitstore.open(checkout / "build" / "submitted.zarr")
    assert not any(layer.missing for layer in store.layers.values())
