"""A Ray head node of its own on loopback, to which jobs are submitted or which they join."""

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
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent
RAY = str(Path(sys.executable).with_name("ray"))


@dataclass(frozen=True, kw_only=True)
class HeadNode:
    """A head node that runs."""

    dashboard: str
    """Where jobs are submitted."""
    address: str
    """What RAY_ADDRESS is for those who join."""
    folder: Path
    """All that it writes."""
    environment: dict[str, str]
    """Of who submits."""
    process: psutil.Process

    def begin(self, *command):
        """Submits a job with the checkout as its working directory; returns the process that follows it."""
        submit = [RAY, "job", "submit", "--address", self.dashboard, "--working-dir", ".", "--", *command]
        pipe = subprocess.PIPE
        return subprocess.Popen(submit, cwd=ROOT, env=self.environment, stdout=pipe, stderr=pipe, text=True)

    def submit(self, *command):
        """Submits a job, and waits for it."""
        job = self.begin(*command)
        out, err = job.communicate(timeout=240)
        return subprocess.CompletedProcess(job.args, job.returncode, out, err)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def head_node(num_cpus):
    """Starts a head node, and ends it with all that it started."""
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # sockets live there: their paths must be short
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"RAY_AUTH_MODE": "disabled", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    port, dashboard, agent = free_port(), free_port(), free_port()
    with (folder / "head.log").open("w") as log:
        head = subprocess.Popen(
            [RAY, "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}",
             f"--num-cpus={num_cpus}", "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1",
             f"--temp-dir={folder / 'ray'}",
             f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={free_port()}"],
            stdout=log, stderr=log, env=environment, start_new_session=True,
        )  # fmt: skip
    node = HeadNode(
        dashboard=f"http://127.0.0.1:{dashboard}", address=f"127.0.0.1:{port}", folder=folder,
        environment=environment, process=psutil.Process(head.pid),
    )  # fmt: skip
    try:
        # the agent takes jobs, and is there later than what passes them on to it
        healthy = f"http://127.0.0.1:{agent}/api/local_raylet_healthz"
        for _ in range(300):
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"{node.dashboard}/api/version", timeout=2),
                urllib.request.urlopen(healthy, timeout=2),
            ):
                break
            assert head.poll() is None, (folder / "head.log").read_text()
            time.sleep(0.2)
        else:
            raise AssertionError((folder / "head.log").read_text())
        yield node
    finally:
        family = [node.process, *node.process.children(recursive=True)]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family, timeout=20)
        head.wait()
        shutil.rmtree(folder, ignore_errors=True)
