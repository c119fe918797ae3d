"""The dump as users submit it: a head node, `ray job submit --working-dir .` from the checkout."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

import logitstore

ROOT = Path(__file__).parent.parent
RAY = str(Path(sys.executable).with_name("ray"))


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def cluster():
    """A head node of its own on loopback: (dashboard address, its folder, environment)."""
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # sockets live there: their paths must be short
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"RAY_AUTH_MODE": "disabled", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    dashboard = free_port()
    with (folder / "head.log").open("w") as log:
        head = subprocess.Popen(
            [RAY, "start", "--head", "--block", f"--port={free_port()}", f"--dashboard-port={dashboard}",
             "--num-cpus=1", "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1",
             f"--temp-dir={folder / 'ray'}",
             f"--dashboard-agent-listen-port={free_port()}", f"--metrics-export-port={free_port()}"],
            stdout=log, stderr=log, env=environment, start_new_session=True,
        )  # fmt: skip
    address = f"http://127.0.0.1:{dashboard}"
    try:
        for _ in range(300):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/api/version", timeout=2):
                break
            assert head.poll() is None, (folder / "head.log").read_text()
            time.sleep(0.2)
        yield address, folder, environment
    finally:
        family = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family, timeout=20)
        head.wait()
        shutil.rmtree(folder, ignore_errors=True)


def test_a_submitted_job_finishes_and_its_store_verifies(cluster, tiny, tmp_path):
    address, folder, environment = cluster
    (ROOT / "build").mkdir(exist_ok=True)
    (ROOT / "build" / "not_uploaded").touch()
    url = tmp_path / "cache.zarr"
    job = subprocess.run(
        [RAY, "job", "submit", "--address", address, "--working-dir", ".", "--",
         "python", "jobs/dump_logits.py", "--store", str(url), "--target", tiny.target, "--data", tiny.data,
         "--reference", f"ref={tiny.reference}", "--max_length", "256", "--shard_rows", "1024", "--k", "8"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert job.returncode == 0, job.stdout + job.stderr
    assert '"shards": {}' in job.stdout
    store = logitstore.open(url)
    assert not any(layer.missing for layer in store.layers.values())
    assert logitstore.verify(store) == []
    (parent,) = set((folder / "ray").rglob("working_dir_files"))
    files = [path.relative_to(parent).parts[1:] for path in parent.rglob("*") if path.is_file()]
    tops = {parts[0] for parts in files if parts}
    assert {"jobs", "logitstore", "trainer", "pyproject.toml"} <= tops
    assert not tops & {".venv", ".git", "build"}


def test_a_submitted_job_with_a_mistake_fails_with_its_line(cluster, tiny, tmp_path):
    address, _, environment = cluster
    job = subprocess.run(
        [RAY, "job", "submit", "--address", address, "--working-dir", ".", "--",
         "python", "jobs/dump_logits.py", "--store", str(tmp_path / "c"), "--target", tiny.target,
         "--data", "/no/data"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert job.returncode == 1
    assert "got data=/no/data" in job.stdout
    assert "Traceback" not in job.stdout
