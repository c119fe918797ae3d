"""Arguments of `logitstore train`: options of this project, transformers' TrainingArguments, and a YAML file of both.

Values in the YAML file replace the defaults of the dataclasses, and flags replace both. An unknown name is refused, and
the error names the most similar known one.
"""

from __future__ import annotations

import argparse
import dataclasses
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.utils.import_utils import is_torch_bf16_gpu_available, is_torch_xla_available

from logitstore.commands.shared_options import RaisingErrors
from logitstore.storage.options import without_credentials
from trainer.evaluation.held_out import greater_is_better
from trainer.loop.refused_arguments import check_awaited, check_optimizer, check_supported, check_training_arguments
from trainer.run.options import (
    GROUPS,
    OURS,
    RunArguments,
)
from trainer.run.output import local_folder
from trainer.run.run_folder import NOT_REPEATED, SETTINGS, read_run

if TYPE_CHECKING:
    from collections.abc import Callable

TRAINING_DEFAULTS: dict[str, object] = {
    "logging_first_step": True,
    "logging_steps": 10,
    "save_total_limit": 2,
    "metric_for_best_model": "alpha_estimate",
    # Early stopping must remember the number of consecutive evaluations without improvement.
    "restore_callback_states_from_checkpoint": True,
    "remove_unused_columns": False,
    # The filter would wait for the GPU after every micro-batch, and affects only a sum that is not logged here.
    "logging_nan_inf_filter": False,
    # Every parameter takes part in the loss, even on a rank that keeps no rows.
    "ddp_find_unused_parameters": False,
    # Without a GPU, torch warns that pinned memory has no effect.
    "dataloader_pin_memory": torch.cuda.is_available(),
}
"""Defaults that differ from those of TrainingArguments. Learning rate, schedule and batch sizes do not differ."""

DEVICE_OF_WORKERS: dict[str, object] = {"use_cpu": True, "tf32": None}
"""Device settings that replace the given ones in this process if Ray workers train. The machine of this process may
have no GPU, even if the workers have GPUs."""


THEIRS = tuple(f.name for f in dataclasses.fields(TrainingArguments) if f.init)
"""Names of transformers' training arguments."""

SHOWN = frozenset({"dry_run", "no_progress", "json"})
"""Options that change only the output on the terminal; run.yaml leaves them out."""

LISTS: dict[str, Callable[[Any], object]] = {
    "store": str, "draft_config": str, "lora_targets": str, "store_weights": float,
}  # fmt: skip
"""Options that take several values, and the type of each value."""


class _Parser(RaisingErrors, HfArgumentParser):
    """HfArgumentParser that raises ValueError instead of ending the process."""


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help formatter that shows defaults and keeps the line breaks of the description."""


def _parser(description: str | None = None) -> _Parser:
    """Returns a parser of all options; its help starts with the description."""
    kinds = (*GROUPS, TrainingArguments)
    return _Parser(
        kinds,  # type: ignore[arg-type]
        allow_abbrev=False,
        description=description,
        formatter_class=_Formatter,
    )


def full_help(description: str) -> str:
    """Returns the help of all options, including those of transformers.

    Args:
        description: Text at the start of the help.
    """
    parser = _parser(description)
    parser.set_defaults(**TRAINING_DEFAULTS)
    return parser.format_help()


def read_values(argv: list[str]) -> dict[str, Any]:
    """Reads all arguments. Values in the YAML file replace the defaults, and flags replace both.

    The first argument is the path of the YAML file, unless it is a flag.

    Args:
        argv: Command line without the name of the program.

    Returns:
        The values by name.

    Raises:
        ValueError: A key or a flag is unknown, or a value has the wrong type.
    """
    parser = _parser()
    parser.set_defaults(**TRAINING_DEFAULTS)
    if argv and not argv[0].startswith("-"):
        parser.set_defaults(**read_run(Path(argv[0]), known={*OURS, *THEIRS}))
        argv = argv[1:]
    # Unknown flags are collected first, so that the error can name the most similar known flag.
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    values = vars(known)
    for name in OURS:
        values[name] = _from_file(name, values[name])
    return values


def _from_file(name: str, value: object) -> object:
    """Converts a value of a YAML file to the type that the flag would give. argparse itself converts strings only.

    Raises:
        ValueError: The value has the wrong type.
    """
    kind = LISTS.get(name)
    if isinstance(value, dict) or (isinstance(value, list) and kind is None):
        wanted = "one value" if kind is None else "a list"
        raise ValueError(f"{name} must be {wanted}, got {name}={value}; write it as the flag takes it")
    if kind is None or value is None:
        return value
    try:
        return [kind(each) for each in (value if isinstance(value, list) else [value])]
    except ValueError:
        raise ValueError(f"{name} must be a list of numbers, got {name}={value}; write it like [1, 0.5]") from None


def repeated(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the values for run.yaml, which repeats a run.

    These are the options of this project, the training arguments that differ from transformers' defaults, and the
    arguments in TRAINING_DEFAULTS and SETTINGS. Credentials in URLs are removed.
    """
    # This parser has the defaults of transformers, because TRAINING_DEFAULTS are not set in it.
    plain = vars(_parser().parse_args([]))
    ours = (name for name in OURS if name not in SHOWN)
    theirs = (
        name
        for name in THEIRS
        if name not in NOT_REPEATED and (values[name] != plain[name] or name in {*TRAINING_DEFAULTS, *SETTINGS})
    )
    found = {name: values[name] for name in (*ours, *theirs)}
    found["store"] = [without_credentials(url) for url in values["store"]]
    return found | {"output_dir": without_credentials(str(values["output_dir"]))}


def parse(argv: list[str]) -> tuple[RunArguments, TrainingArguments, dict[str, Any]]:
    """Reads and checks the arguments.

    Args:
        argv: Command line without the name of the program.

    Returns:
        The options of this project, transformers' training arguments, and all values by name.

    Raises:
        ValueError: A key or a flag is unknown, or a value does not fit.
    """
    values = read_values(argv)
    return (*check(values), values)


def check(values: dict[str, Any]) -> tuple[RunArguments, TrainingArguments]:
    """Turns values into the options of this project and transformers' training arguments, and checks them.

    Args:
        values: All values by name. If `greater_is_better` is None, it is changed in this dict to fit the metric.

    Returns:
        The options of this project, and transformers' training arguments.

    Raises:
        ValueError: A value does not fit.
    """
    made: dict[str, Any] = {
        group._argument_group_name: group(**{f.name: values[f.name] for f in dataclasses.fields(group)})
        for group in GROUPS
    }
    run = RunArguments(**made)
    if not values["output_dir"]:
        raise ValueError("output_dir must be given, got none; add --output_dir")
    if values["disable_tqdm"]:
        raise ValueError("disable_tqdm must be left out, got disable_tqdm=True; give --no_progress")
    # Trainer can write to a local folder only. Files for a URL are copied from there.
    given = {name: values[name] for name in THEIRS} | {"output_dir": str(local_folder(values["output_dir"]))}
    given["disable_tqdm"] = run.batches.no_progress
    if run.batches.num_workers is None:
        # If Ray workers train, the GPUs of this machine do not matter.
        _check_precision(values)
    else:
        given |= DEVICE_OF_WORKERS
    run.source(values["seed"])  # Raises ValueError if the options of the draft contradict each other.
    check_supported(values)
    _check_evaluation(run, values)
    if values["greater_is_better"] is None:
        values["greater_is_better"] = greater_is_better(str(values["metric_for_best_model"]))
    training = TrainingArguments(**given | {"greater_is_better": values["greater_is_better"]})
    check_training_arguments(training)
    if run.batches.num_workers is None:
        # With Ray workers the optimizer is created on their machines, not here.
        check_optimizer(training)
    for name in training.report_to or []:
        if name not in get_available_reporting_integrations():
            raise ValueError(f"report_to must be installed here, got report_to={name}; pip install it, or omit it")
    return run, training


def _check_precision(values: dict[str, Any]) -> None:
    """Raises ValueError if no GPU computes in a requested precision.

    Without this check, transformers would raise a less clear error, or fail later.
    """
    if values["use_cpu"] or is_torch_xla_available():
        return
    for name in ("bf16", "bf16_full_eval"):
        if values[name] and not is_torch_bf16_gpu_available():
            raise ValueError(
                f"{name} needs a GPU that computes in bfloat16, got {name}=True without one; omit --{name}, or "
                "add --use_cpu true to use bfloat16 on the CPU"
            )


def _check_evaluation(run: RunArguments, values: dict[str, Any]) -> None:
    """Raises ValueError if evaluations are requested without held-out documents.

    Also raises ValueError if another argument needs evaluations, but none are requested.
    """
    strategy = getattr(values["eval_strategy"], "value", values["eval_strategy"])
    for name, value in {"eval_strategy": strategy, "eval_on_start": values["eval_on_start"]}.items():
        if value not in ("no", False) and not run.store.eval_fraction:
            raise ValueError(
                f"eval_fraction must be above 0 to evaluate, got eval_fraction=0 with {name}={value}; "
                "add --eval_fraction 0.01"
            )
    check_awaited({**values, "early_stopping": run.batches.early_stopping})


HELP_WIDTH = 118
"""Maximum number of columns in a line of the help."""
COLUMN = 29
"""Column where the help texts start."""


def help_text(description: str) -> str:
    """Returns the help of this project's own options, short enough for one screen; defaults are in brackets.

    Args:
        description: Text at the start of the help.
    """
    lines = [description.strip()]
    for group in GROUPS:
        lines.append(f"\n{group._argument_group_name}: {str(group.__doc__).rstrip('.').lower()}")
        for each in dataclasses.fields(group):
            usual = each.default if each.default_factory is dataclasses.MISSING else " ".join(each.default_factory())
            text = each.metadata["help"] + (f" [{str(usual).lower()}]" if usual not in (None, "") else "")
            many = " ..." if "list" in str(each.type) else ""
            flag = f"  --{each.name} {each.metadata['metavar']}{many}"
            lines += textwrap.wrap(text, HELP_WIDTH, initial_indent=f"{flag:<{COLUMN}}", subsequent_indent=" " * COLUMN)
    return "\n".join(lines)
