"""An output of train_draft.py: which run it holds, how far that is, and whether another may go on with it.

In it are run.yaml, which repeats the run; checkpoints; the model; and trainer_state.json, which is written last: the
model is finished, and run.yaml is its run.
"""

from __future__ import annotations

import difflib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from transformers import TrainerState

from trainer.loop import checkpoints
from trainer.loop.position import is_stopped_early

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import TrainingArguments

RUN, STATE, MODEL = "run.yaml", "trainer_state.json", "config.json"

SETTINGS = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "adam_beta1", "adam_beta2",
    "adam_epsilon", "max_grad_norm", "num_train_epochs", "max_steps", "per_device_train_batch_size",
    "gradient_accumulation_steps", "bf16", "seed",
)  # fmt: skip
"""Training arguments that run.yaml and the card always say: defaults differ between releases of transformers."""

NOT_REPEATED = frozenset({"resume_from_checkpoint", "hub_token", "local_rank", "dataloader_pin_memory"})
"""Training arguments that run.yaml leaves out: of one start or one machine only, or secret."""

STEPS = ("max_steps", "num_train_epochs")

MAY_CHANGE = NOT_REPEATED | {
    *STEPS,
    "output_dir",  # the folder itself, by whatever path
    "cache_dir",
    "cache_bytes",
    "storage_options",  # of a machine: how the same bytes are reached
    # of a machine too: the next step begins at the next document whatever their number
    "dataloader_num_workers",
    "dataloader_persistent_workers",
    "dataloader_prefetch_factor",
    "gradient_accumulation_steps",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "num_workers",
    "disable_tqdm",
    "include_num_input_tokens_seen",
    "project",
    "push_to_hub",
    "report_to",
    "run_name",
}
"""What a run may go on with otherwise than it began: its end, and what is logged, saved and reported of it."""

MAY_CHANGE_PREFIXES = ("log_", "logging_", "save_", "hub_", "trackio_")


HOW_FAST = ("eval_runtime", "eval_rows_per_second")


@dataclass(frozen=True, kw_only=True)
class Held:
    """What an output holds."""

    where: str
    """Its folder or URL, as messages name it."""
    folder: Path
    """Has its run.yaml and trainer_state.json, if it has them."""
    names: frozenset[str]
    """Of all its files and folders."""
    finished: Callable[[], list[str]]
    """Lists its finished checkpoints by their step."""
    kept: Callable[[], str | None] = lambda: None
    """Finds a later one of the same run that this machine has, and that did not reach the output's URL."""


def held_in(folder: Path) -> Held:
    """Returns what a folder of this machine holds; nothing if there is none."""
    names = frozenset(path.name for path in folder.iterdir()) if folder.is_dir() else frozenset()
    return Held(
        where=str(folder),
        folder=folder,
        names=names,
        finished=lambda: [path.name for path in checkpoints.finished(folder)],
    )


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
        raise ValueError(f"run file must have the names of flags only, got {unknown[0]!r} in {path}{meant}; see --help")
    return {k: v if v is None or isinstance(v, list | dict) else str(v) for k, v in values.items()}


def write_run(folder: Path, run: dict[str, Any]) -> None:
    """Writes run.yaml whole or not at all."""
    partial = folder / f"{RUN}.partial"
    partial.write_text(yaml.safe_dump(run, sort_keys=False), encoding="utf-8")
    partial.replace(folder / RUN)


def write_state(folder: Path, state: TrainerState) -> None:
    """Writes trainer_state.json whole or not at all: with it a model is finished."""
    partial = folder / f"{STATE}.partial"
    state.save_to_json(str(partial))
    partial.replace(folder / STATE)


def check_same_run(held: Held, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Compares all arguments of the run that an output holds with those of the one to go on with it.

    Raises:
        ValueError: They differ in more than the end, or than what is logged, saved and reported.
    """
    for name, value in now.items():
        if name not in MAY_CHANGE and not name.startswith(MAY_CHANGE_PREFIXES) and before[name] != value:
            raise ValueError(
                f"{name} must be {_shown(before[name])} as in {held.where}/{RUN} to go on with that run, got "
                f"{name}={_shown(value)}; give that, or another --output_dir"
            )


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def find_finished(held: Held, training: TrainingArguments) -> TrainerState | None:
    """Reads what the finished model of an output says of its training, None where there is more to do.

    Its run.yaml, if there is one, is known to be the same run.

    Raises:
        ValueError: The model is of no known run, or there is more to do and no checkpoint to begin with.
    """
    if MODEL not in held.names:
        return None
    if RUN not in held.names:
        raise ValueError(
            f"output_dir must hold a run to go on with, got output_dir={held.where}, whose model no {RUN} describes; "
            "give another --output_dir"
        )
    if STATE not in held.names:
        return None
    state: TrainerState = TrainerState.load_from_json(str(held.folder / STATE))
    if training.max_steps > 0:
        wanted, reached = f"max_steps={training.max_steps}", state.global_step >= training.max_steps
    else:
        wanted = f"num_train_epochs={training.num_train_epochs:g}"
        reached = (state.epoch or 0.0) >= training.num_train_epochs - 1e-9
    if reached or is_stopped_early(state):
        return state
    if not held.finished() and str(training.resume_from_checkpoint).lower() == "true":
        raise ValueError(
            f"{wanted.partition('=')[0]} must be what the finished run in {held.where} has reached, step "
            f"{state.global_step}, where there is no checkpoint to go on from, got {wanted}; give another --output_dir"
        )
    return None


def find_checkpoint(held: Held, wanted: str) -> str | None:
    """Decides where to go on.

    Args:
        held: The output.
        wanted: "true" for its last finished checkpoint, if it has one; or the path of one, or its URL.

    Returns:
        The checkpoint's folder, or its URL in an output at a URL.

    Raises:
        ValueError: The path is not that of a finished checkpoint, or the output has a later one: the next `true`
            would go on from that.
    """
    found = [f"{held.where}/{name}" for name in held.finished()]
    if (kept := held.kept()) is not None:
        found.append(kept)
    if wanted.lower() == "true":
        return found[-1] if found else None
    wanted = next((each for each in found if _same_place(each, wanted)), wanted)
    if wanted in found:
        if wanted != found[-1]:
            raise ValueError(
                f"resume_from_checkpoint must be the last checkpoint of the run, got resume_from_checkpoint={wanted}, "
                f"and there is {found[-1]}; delete the later ones, or give another --output_dir"
            )
        return wanted
    if reason := checkpoints.defect(Path(wanted)):
        raise ValueError(
            f"resume_from_checkpoint must be a finished checkpoint folder or true, got "
            f"resume_from_checkpoint={wanted}; {reason}"
        )
    return wanted


def _same_place(one: str, other: str) -> bool:
    return one == other.rstrip("/") or ("://" not in one + other and Path(one).resolve() == Path(other).resolve())


def check_new(held: Held) -> None:
    """Raises ValueError if an output holds a run already."""
    has_checkpoints = any(name.startswith(checkpoints.PREFIX) for name in held.names)
    if held.folder.is_file() or has_checkpoints or MODEL in held.names:
        raise ValueError(
            f"output_dir must be new or empty, got output_dir={held.where}, which holds a run; give another "
            "--output_dir, or --resume_from_checkpoint true to go on with it"
        )


def figures(state: TrainerState) -> dict[str, float]:
    """Reads what a training says of itself when it ends.

    Returns:
        steps, loss (NaN where none was logged), train_runtime (seconds) and rows_per_second; and what the last
        evaluation found, if there was one: eval_NAME.
    """
    last = next(entry for entry in reversed(state.log_history) if "train_runtime" in entry)
    losses = [entry[name] for entry in state.log_history for name in ("train_loss", "loss") if name in entry]
    evaluated: dict[str, float] = next((entry for entry in reversed(state.log_history) if "eval_rows" in entry), {})
    return {
        "steps": state.global_step,
        "loss": losses[-1] if losses else math.nan,
        "train_runtime": last["train_runtime"],
        "rows_per_second": float(last["train_rows_per_second"]),
        **{name: value for name, value in evaluated.items() if name.startswith("eval_") and name not in HOW_FAST},
    }


def result_line(where: str, found: dict[str, float]) -> str:
    """Returns what the job prints last."""
    return json.dumps({"draft": where, **found})
