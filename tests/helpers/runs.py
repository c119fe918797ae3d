"""Arguments for `logitstore train` on the tiny store, runs of it by torchrun, and the weights that a run wrote."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.helpers.paths import HELPERS, environment

QUIET = ["--no_progress", "true", "--use_cpu", "true"]
FAST = [*QUIET, "--learning_rate", "0.01", "--per_device_train_batch_size", "6", "--logging_steps", "2"]


def arguments(tiny, tiny_store, output_dir, *extra):
    return ["--store", tiny_store, "--draft", tiny.draft, "--output_dir", str(output_dir), *FAST, *extra]


def torchrun(ranks, *jobs):
    """Runs several jobs one after another in the same processes, because starting processes takes most of the time."""
    script = HELPERS / "many_runs.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command += [str(script), json.dumps(jobs)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, env=environment()
    )
    assert done.returncode == 0, done.stdout


def weights(folder):
    return load_file(Path(folder, "model.safetensors"))


def same_weights(one, other):
    return all(torch.equal(one[name], other[name]) for name in one | other)


def refuse_models(*args, **kwargs):
    raise AssertionError("weights were loaded before the arguments were checked")
