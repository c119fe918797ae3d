"""An output directory of train_draft.py: which run it holds, how far that is, and whether another may go on with it.

In it are run.yaml, which repeats the run; checkpoints; the model; and trainer_state.json, which is written last: the
model is finished, and run.yaml is its run.
"""

from __future__ import annotations

import difflib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from transformers import TrainerState

from trainer import checkpoints

if TYPE_CHECKING:
    from transformers import TrainingArguments

RUN, STATE, MODEL = "run.yaml", "trainer_state.json", "config.json"

NOT_REPEATED = frozenset({"resume_from_checkpoint", "hub_token", "local_rank", "dataloader_pin_memory"})
"""Training arguments that run.yaml leaves out: of one start or one machine only, or secret."""

STEPS = ("max_steps", "num_train_epochs")

MAY_CHANGE = NOT_REPEATED | {
    *STEPS,
    "output_dir",  # the folder itself, by whatever path
    "cache_dir", "cache_bytes", "storage_options",  # of a machine: how the same bytes are reached
    # of a machine too: the next step begins at the next document whatever their number
    "dataloader_num_workers", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "gradient_accumulation_steps", "per_device_train_batch_size",
    "disable_tqdm",
    "enable_jit_checkpoint",
    "include_num_input_tokens_seen",
    "project",
    "push_to_hub",
    "report_to",
    "run_name",
}
"""What a run may go on with otherwise than it began: its end, and what is logged, saved and reported of it."""

MAY_CHANGE_PREFIXES = ("log_", "logging_", "save_", "hub_", "trackio_")


def read_run(path: Path, known: set[str]) -> dict[str, Any]:
    """Reads a file of arguments.

    Args:
        path: YAML.
        known: Names that it may have.

    Returns:
        The values, as defaults for argparse: that converts and checks those that are strings, as if they were flags,
        and 3e-4 is a string to YAML.

    Raises:
        ValueError: It cannot be read, or has other names.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not YAML ({type(error).__name__})"
        raise ValueError(f"run file must be a readable YAML file, got {path}: {reason}; see --help") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"run file must be a file of `name: value` lines, got {path}, which holds something else")
    if unknown := sorted(set(values) - known):
        near = difflib.get_close_matches(unknown[0], known, 1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(
            f"run file must have the names of flags only, got {unknown[0]!r} in {path}{meant}; see --help"
        )
    return {k: v if v is None or isinstance(v, list | dict) else str(v) for k, v in values.items()}


def write_run(folder: Path, run: dict[str, Any]) -> None:
    """Writes run.yaml whole or not at all."""
    partial = folder / f"{RUN}.partial"
    partial.write_text(yaml.safe_dump(run, sort_keys=False), encoding="utf-8")
    partial.replace(folder / RUN)


def check_same_run(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Compares all arguments of the run that a folder holds with those of the one to go on with it.

    Raises:
        ValueError: They differ in more than the end, or than what is logged, saved and reported.
    """
    for name, value in now.items():
        if name not in MAY_CHANGE and not name.startswith(MAY_CHANGE_PREFIXES) and before[name] != value:
            raise ValueError(
                f"{name} must be {before[name]} as in {folder / RUN} to go on with that run, got {name}={value}; "
                "give that, or another --output_dir"
            )


def find_finished(folder: Path, training: TrainingArguments) -> TrainerState | None:
    """Reads what the finished model of a folder says of its training, None where there is more to do.

    The folder's run.yaml, if there is one, is known to be the same run.

    Raises:
        ValueError: The model is of no known run, or there is more to do and no checkpoint to begin with.
    """
    if not (folder / MODEL).exists():
        return None
    if not (folder / RUN).exists():
        raise ValueError(
            f"output_dir must hold a run to go on with, got output_dir={folder}, whose model no {RUN} describes; "
            "give another --output_dir"
        )
    if not (folder / STATE).exists():
        return None
    state: TrainerState = TrainerState.load_from_json(str(folder / STATE))
    if training.max_steps > 0:
        wanted, reached = f"max_steps={training.max_steps}", state.global_step >= training.max_steps
    else:
        wanted = f"num_train_epochs={training.num_train_epochs:g}"
        reached = (state.epoch or 0.0) >= training.num_train_epochs - 1e-9
    if reached:
        return state
    if not checkpoints.finished(folder) and str(training.resume_from_checkpoint).lower() == "true":
        raise ValueError(
            f"{wanted.partition('=')[0]} must be what the finished run in {folder} has reached, step "
            f"{state.global_step}, where there is no checkpoint to go on from, got {wanted}; give another --output_dir"
        )
    return None


def find_checkpoint(folder: Path, wanted: str) -> str | None:
    """Decides where to go on.

    Args:
        folder: The output directory.
        wanted: "true" for its last finished checkpoint, if it has one; or the path of one.

    Raises:
        ValueError: The path is not that of a finished checkpoint.
    """
    if wanted.lower() == "true":
        found = checkpoints.finished(folder)
        return str(found[-1]) if found else None
    if reason := checkpoints.defect(Path(wanted)):
        raise ValueError(
            f"resume_from_checkpoint must be a finished checkpoint folder or true, got "
            f"resume_from_checkpoint={wanted}; {reason}"
        )
    return wanted


def check_new(folder: Path) -> None:
    """Raises ValueError if an output directory holds a run already."""
    if folder.is_file() or any(folder.glob("checkpoint-*")) or (folder / MODEL).exists():
        raise ValueError(
            f"output_dir must be new or empty, got output_dir={folder}, which holds another run; give another "
            "--output_dir, or --resume_from_checkpoint true to go on with it"
        )


def figures(state: TrainerState) -> dict[str, float]:
    """Reads what a training says of itself when it ends.

    Returns:
        steps, loss (NaN where none was logged), train_runtime (seconds) and rows_per_second.
    """
    last = next(entry for entry in reversed(state.log_history) if "train_runtime" in entry)
    losses = [entry[name] for entry in state.log_history for name in ("train_loss", "loss") if name in entry]
    return {
        "steps": float(state.global_step),
        "loss": losses[-1] if losses else math.nan,
        "train_runtime": last["train_runtime"],
        "rows_per_second": float(last["train_rows_per_second"]),
    }


def result_line(folder: Path, found: dict[str, float]) -> str:
    """Returns what the job prints last."""
    return json.dumps({"draft": str(folder), **found})
