"""Starts a Ray head node on loopback, to which jobs can be submitted and which they can join."""

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

from tests.helpers.paths import ROOT

RAY = str(Path(sys.executable).with_name("ray"))


@dataclass(frozen=True, kw_only=True)
class HeadNode:
    """A running head node."""

    dashboard: str
    """URL to which jobs are submitted."""
    address: str
    """Value of RAY_ADDRESS for processes that join."""
    folder: Path
    """Folder of all files that the head node writes."""
    environment: dict[str, str]
    """Environment of the process that submits."""
    process: psutil.Process

    def begin(self, *command):
        """Submits a job with the checkout as its working directory; returns the process of `ray job submit`."""
        submit = [RAY, "job", "submit", "--address", self.dashboard, "--working-dir", ".", "--", *command]
        pipe = subprocess.PIPE
        return subprocess.Popen(submit, cwd=ROOT, env=self.environment, stdout=pipe, stderr=pipe, text=True)

    def submit(self, *command):
        """Submits a job and waits for its end."""
        job = self.begin(*command)
        out, err = job.communicate(timeout=240)
        return subprocess.CompletedProcess(job.args, job.returncode, out, err)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def head_node(num_cpus):
    """Starts a head node, and at the end kills it and all processes that it started."""
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # it contains sockets, whose paths must be short
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
        # The agent, which runs jobs, starts later than the dashboard, which passes jobs on to the agent.
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
