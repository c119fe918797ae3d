"""Reads a run's output: the arguments of the run, its progress, and whether it can be resumed.

An output holds run.yaml (the arguments that repeat the run), the checkpoints and the model. trainer_state.json is
written last. Its presence means that the model is finished, and that run.yaml describes this model.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from transformers import TrainerState

from logitstore.storage import local_disk
from logitstore.storage.options import without_credentials
from trainer.loop import checkpoints
from trainer.loop.position import is_stopped_early

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import TrainingArguments

RUN, STATE, MODEL = "run.yaml", "trainer_state.json", "config.json"
"""Names of files in an output. An output holds a model if it holds config.json."""

SETTINGS = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "adam_beta1", "adam_beta2",
    "adam_epsilon", "max_grad_norm", "num_train_epochs", "max_steps", "per_device_train_batch_size",
    "gradient_accumulation_steps", "bf16", "seed",
)  # fmt: skip
"""Training arguments that run.yaml and the model card always state, because their defaults differ between releases of
transformers."""

NOT_REPEATED = frozenset({"resume_from_checkpoint", "hub_token", "local_rank", "dataloader_pin_memory"})
"""Training arguments that run.yaml leaves out: they apply to one start or one machine only, or they are secret."""

STEPS = ("max_steps", "num_train_epochs")
"""Arguments that set the length of a run."""

MAY_CHANGE = NOT_REPEATED | {
    *STEPS,
    "output_dir",  # The same folder may be given by another path.
    "cache_dir",
    "cache_bytes",
    "storage_options",  # Another machine may reach the same data in another way.
    # A resumed run always continues with the next document, so these arguments do not change the order of documents.
    "dataloader_num_workers",
    "dataloader_persistent_workers",
    "dataloader_prefetch_factor",
    "gradient_accumulation_steps",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "num_workers",
    "no_progress",
    "json",
    "include_num_input_tokens_seen",
    "project",
    "push_to_hub",
    "report_to",
    "run_name",
}
"""Arguments that may differ when a run is resumed. They set the length of the run, its use of the machine, and what the
run logs, saves and reports."""

MAY_CHANGE_PREFIXES = ("log_", "logging_", "save_", "hub_", "trackio_")
"""Name prefixes of further arguments that may differ when a run is resumed."""


HOW_FAST = ("eval_runtime", "eval_rows_per_second")
"""Names of the duration and the speed of an evaluation. `figures` leaves them out."""


@dataclass(frozen=True, kw_only=True)
class Held:
    """Contents of an output."""

    where: str
    """Folder or URL of the output, as messages show it."""
    folder: Path
    """Local folder with the output's run.yaml and trainer_state.json, if these exist."""
    names: frozenset[str]
    """Names of all files and folders in the output."""
    finished: Callable[[], list[str]]
    """Returns the names of the finished checkpoints, in the order of their steps."""
    kept: Callable[[], str | None] = lambda: None
    """Returns the folder of this machine's last checkpoint of the same run, if that checkpoint is later than all
    checkpoints at the output's URL; otherwise None."""


def held_in(folder: Path) -> Held:
    """Returns the contents of a local folder; empty if the folder does not exist."""
    names = frozenset(path.name for path in folder.iterdir()) if folder.is_dir() else frozenset()
    return Held(
        where=str(folder),
        folder=folder,
        names=names,
        finished=lambda: [path.name for path in checkpoints.finished(folder)],
    )


def read_run(path: Path, known: set[str]) -> dict[str, Any]:
    """Reads a YAML file of arguments.

    Args:
        path: The file.
        known: Names that are allowed.

    Returns:
        The values by name, as defaults for argparse. Numbers and booleans are returned as strings, because argparse
        converts and checks a default only if it is a string. (YAML reads some numbers, such as 3e-4, as strings
        anyway.)

    Raises:
        ValueError: The file cannot be read, or contains unknown names.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not YAML ({type(error).__name__})"
        raise ValueError(f"run file must be a readable YAML file, got {path}: {reason}; see --help") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"run file must contain only `name: value` lines, got {path} with other contents")
    if unknown := sorted(set(values) - known):
        near = difflib.get_close_matches(unknown[0], known, 1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(
            f"keys of the run file must be names of flags, got {unknown[0]!r} in {path}{meant}; see --help"
        )
    return {k: v if v is None or isinstance(v, list | dict) else str(v) for k, v in values.items()}


def write_run(folder: Path, run: dict[str, Any]) -> None:
    """Writes run.yaml in one atomic step."""
    local_disk.put(folder / RUN, yaml.safe_dump(run, sort_keys=False).encode())


def write_state(folder: Path, state: TrainerState) -> None:
    """Writes trainer_state.json in one atomic step. The file marks the model as finished."""
    with local_disk.partial_file(folder / STATE) as partial:
        state.save_to_json(str(partial))
        partial.replace(folder / STATE)


def check_same_run(held: Held, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Checks that a resumed run has the same arguments as the run in the output folder.

    Args:
        held: Contents of the output folder of that run.
        before: Arguments in the output's run.yaml.
        now: Arguments of the resumed run.

    Raises:
        ValueError: An argument differs, and MAY_CHANGE and MAY_CHANGE_PREFIXES do not allow it.
    """
    for name, value in now.items():
        if name not in MAY_CHANGE and not name.startswith(MAY_CHANGE_PREFIXES) and before[name] != value:
            raise ValueError(
                f"{name} must be {_shown(before[name])} as in {held.where}/{RUN} to resume that run, got "
                f"{name}={_shown(value)}; give that value, or another --output_dir"
            )


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def find_finished(held: Held, training: TrainingArguments) -> TrainerState | None:
    """Returns the state of a finished run; None if the output holds no run, or if the run still has steps to do.

    Args:
        held: Contents of the output folder. Its run.yaml, if it exists, must have passed `check_same_run`.
        training: Training arguments of the resumed run, which set the number of its steps.

    Raises:
        ValueError: The output has a model but no run.yaml, or the run still has steps to do but has no checkpoint.
    """
    if MODEL not in held.names:
        return None
    if RUN not in held.names:
        raise ValueError(
            f"output_dir must hold a run to resume, got output_dir={held.where}, which has a model but no {RUN}; "
            "give another --output_dir"
        )
    if STATE not in held.names:
        # Without trainer_state.json, the files of the model may be incomplete.
        return None
    state: TrainerState = TrainerState.load_from_json(str(held.folder / STATE))
    if training.max_steps > 0:
        wanted, reached = f"max_steps={training.max_steps}", state.global_step >= training.max_steps
    else:
        wanted = f"num_train_epochs={training.num_train_epochs:g}"
        # The epoch is a sum of fractions, so rounding may leave it slightly below the requested number.
        reached = (state.epoch or 0.0) >= training.num_train_epochs - 1e-9
    if reached or is_stopped_early(state):
        return state
    if not held.finished() and str(training.resume_from_checkpoint).lower() == "true":
        raise ValueError(
            f"the finished run in {held.where} (step {state.global_step}) has no checkpoint from which it could go on "
            f"to {wanted}; give another --output_dir"
        )
    return None


def find_checkpoint(held: Held, wanted: str) -> str | None:
    """Returns the checkpoint to resume from; None to start from the draft.

    Args:
        held: Contents of the output folder of that run.
        wanted: "true" for the last finished checkpoint of the output, or the path or URL of a checkpoint.

    Returns:
        Local folder or URL of the checkpoint; None if `wanted` is "true" and there is no finished checkpoint.

    Raises:
        ValueError: `wanted` is not a finished checkpoint, or the output has a later checkpoint. In the second case, the
            next start with "true" would continue from the later checkpoint and ignore the steps made after `wanted`.
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
                f"but {found[-1]} is later; delete the later checkpoints, or give another --output_dir"
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
    """Raises ValueError if an output holds anything that a run could overwrite, or is a file."""
    if MODEL in held.names and RUN not in held.names and "zarr.json" not in held.names:
        raise ValueError(
            f"output_dir must be new or empty, got output_dir={held.where}, which holds a model; give "
            "another --output_dir"
        )
    check_own(held)
    has_checkpoints = any(name.startswith(checkpoints.PREFIX) for name in held.names)
    if has_checkpoints or MODEL in held.names:
        raise ValueError(
            f"output_dir must be new or empty, got output_dir={held.where}, which holds a run; give another "
            "--output_dir, or --resume_from_checkpoint true to resume that run"
        )


def check_own(held: Held) -> None:
    """Raises ValueError if an output holds files of which none is a run's, or is a file."""
    # A killed start leaves a partial run.yaml. Checkpoints alone may be a copy of those of a run.
    own = (RUN, checkpoints.PREFIX, ".")
    other = ""
    if held.folder.is_file():
        other = "is a file"
    elif "zarr.json" in held.names:
        other = "holds a store"
    elif RUN not in held.names and (foreign := sorted(name for name in held.names if not name.startswith(own))):
        other = f"holds other files, such as {foreign[0]}"
    if other:
        raise ValueError(
            f"output_dir must be new or empty, got output_dir={held.where}, which {other}; give another --output_dir"
        )


def figures(state: TrainerState) -> dict[str, float]:
    """Returns the figures of a finished training.

    Returns:
        steps, loss (nats; NaN if none was logged), train_runtime (seconds) and rows_per_second. If there was an
        evaluation, also the results of the last one except its duration and speed, each under the name eval_NAME.
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


def result_lines(where: str, store: str, found: dict[str, float]) -> list[str]:
    """Returns the lines printed at the end of a run: steps, speed, loss, acceptance rates and the next command.

    Args:
        where: Folder or URL of the draft, without credentials.
        store: URL of the first store that the draft was trained on.
        found: The figures that `figures` returned.
    """
    rate = f"{found['train_runtime']:,.1f} s, {found['rows_per_second']:,.0f} rows/s"
    lines = [f"draft in {where}: {found['steps']:,.0f} steps in {rate}, mean loss {found['loss']:.4f}"]
    if "eval_alpha_estimate" in found:
        lines.append(
            f"  held out: alpha {found['eval_alpha_estimate']:.4f} sampled, "
            f"{found['eval_argmax_agreement']:.4f} greedy, over {found['eval_rows']:,.0f} rows"
        )
    lines.append(f"next: logitstore evaluate --store {without_credentials(store)} --draft {where}")
    return lines
