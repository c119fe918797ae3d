"""A target with the weights of tiny.target that fails at chosen tokens. A test selects the failures at run time."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

CODE = """
import json
import os
import signal
import time
from pathlib import Path

import torch
from transformers import LlamaForCausalLM


class FailingForCausalLM(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model.register_forward_pre_hook(before, with_kwargs=True)
        self.model.register_forward_hook(after, with_kwargs=True)


def tokens_to(model, how, kwargs):
    tokens = json.loads(Path(model.config.failures).read_text()).get(how, [])
    return torch.isin(kwargs["input_ids"], torch.tensor(tokens, dtype=torch.long))


def before(model, args, kwargs):
    if tokens_to(model, "slow", kwargs).any():
        time.sleep(0.05)
    if tokens_to(model, "die", kwargs).any():
        os.kill(os.getpid(), signal.SIGKILL)
    if tokens_to(model, "lose the device", kwargs).any():
        seen = Path(model.config.failures).with_name(f"{os.getpid()}.lost")
        seen.touch()
        if len(list(seen.parent.glob("*.lost"))) == 1:  # only the first process fails, and keeps failing
            raise torch.AcceleratorError("CUDA error: device-side assert triggered")


def after(model, args, kwargs, output):
    wrong = tokens_to(model, "nan", kwargs).any(1)
    if wrong.any():
        output.last_hidden_state[wrong] = float("nan")
"""


def make(folder: Path, target: str) -> Path:
    """Writes the model into a folder. It must be loaded with trust_remote_code, and does not fail until `fail`."""
    folder.mkdir(parents=True)
    shutil.copytree(target, folder / "model")
    (folder / "model" / "modeling_failing.py").write_text(CODE)
    config = json.loads((folder / "model" / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_failing.FailingForCausalLM"}
    config["failures"] = str(folder / "failures.json")
    (folder / "model" / "config.json").write_text(json.dumps(config))
    fail(folder)
    return folder / "model"


def fail(folder: Path, **tokens: list[int]) -> None:
    """Sets the tokens at which the model fails from now on, such as `die=[17]`. The model's identity stays the same."""
    (folder / "failures.json").write_text(json.dumps({how.replace("_", " "): ids for how, ids in tokens.items()}))
