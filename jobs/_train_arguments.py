"""The arguments of train_draft.py: its own in groups, transformers' TrainingArguments beside them, and a file of both.

Values come from the dataclasses, then from a YAML file, then from flags; a name that nobody knows is refused with the
nearest one that is known.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from _output import local_folder
from _runs import NOT_REPEATED, SETTINGS, read_run
from _train_options import GROUPS, OURS, BatchArguments, DraftArguments, LossArguments, StoreArguments
from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.utils.import_utils import is_torch_bf16_gpu_available, is_torch_xla_available

from logitstore.arguments import RaisingErrors
from logitstore.storage.options import without_credentials
from trainer.data.order import check_eval_fraction, check_window
from trainer.drafts.lora import Lora
from trainer.drafts.source import DraftSource
from trainer.evaluation.held_out import greater_is_better
from trainer.loop.refused_arguments import check_awaited, check_optimizer, check_supported, check_training_arguments
from trainer.loop.step_accounting import DENOMINATORS, Denominator
from trainer.loss.objectives import Objective, make_objective
from trainer.loss.selection import Rule, make_rule

if TYPE_CHECKING:
    from collections.abc import Callable

TRAINING_DEFAULTS: dict[str, object] = {
    "logging_first_step": True,
    "logging_steps": 10,
    "save_total_limit": 2,
    "metric_for_best_model": "alpha_estimate",
    # how often evaluations were no better, for early stopping
    "restore_callback_states_from_checkpoint": True,
    "remove_unused_columns": False,
    # looks at every micro-batch on the device, for a sum that is not shown here
    "logging_nan_inf_filter": False,
    # the loss hangs on every parameter, whatever rows a rank keeps
    "ddp_find_unused_parameters": False,
    # without a GPU torch warns that there is nothing to pin for
    "dataloader_pin_memory": torch.cuda.is_available(),
}
"""Where this job's defaults are not those of TrainingArguments; rates, schedules and sizes are transformers' own."""

DEVICE_OF_WORKERS: dict[str, object] = {"use_cpu": True, "tf32": None}
"""What this process leaves to workers: it may have no GPU where they have one."""


THEIRS = tuple(f.name for f in dataclasses.fields(TrainingArguments) if f.init)

LISTS: dict[str, Callable[[Any], object]] = {
    "store": str, "draft_config": str, "lora_targets": str, "store_weights": float,
}  # fmt: skip
"""Options of several values, and what each of them is."""

CHOICES: dict[str, tuple[str, ...]] = {
    "denominator": DENOMINATORS,
    "dtype": ("auto", "float32", "bfloat16"),
}


@dataclass(frozen=True, kw_only=True)
class RunArguments:
    """All arguments, checked as far as they can be without reading anything."""

    store: StoreArguments
    draft: DraftArguments
    loss: LossArguments
    batches: BatchArguments

    def __post_init__(self) -> None:
        if not all(self.store.store) or not self.store.store:
            raise ValueError("store must be given, got none; add --store")
        for name, known in CHOICES.items():
            value = getattr(self.loss if name == "denominator" else self.draft, name)
            if value not in known:
                raise ValueError(f"{name} must be one of {list(known)}, got {name}={value}; change --{name}")
        for name, least in {"eval_documents": 1, "queue_rows": 1, "num_workers": 1, "early_stopping": 1}.items():
            found = next(getattr(part, name) for part in vars(self).values() if hasattr(part, name))
            if found is not None and found < least:
                raise ValueError(f"{name} must be at least {least}, got {name}={found}; leave it out")
        check_eval_fraction(self.store.eval_fraction)
        check_window(self.batches.shuffle_window)
        self.objective()
        self._check_used()
        needs = self.rule().selection.needs
        for name, column in {"reference": "reference_ce", "initial": "initial_ce"}.items():
            if column in needs and getattr(self.loss, name) is None:
                raise ValueError(
                    f"{name} must be given with selection={self.loss.selection}, got {name}=None; "
                    f"add --{name} NAME, where NAME is that of jobs/dump_logits.py --reference NAME=MODEL"
                )
        if self.loss.initial is not None and self.loss.initial == self.loss.reference:
            raise ValueError(
                f"initial must be other losses than reference, got initial={self.loss.initial} for both; give those of "
                "the draft as it is now"
            )

    def _check_used(self) -> None:
        """Raises ValueError if an option is given that would go unheeded: another is missing, most likely."""
        loss, draft, rule = self.loss, self.draft, self.rule()
        selects, competes = rule.selection.selects, rule.selection.competes
        uses = {
            "keep": (loss, competes, "a --selection that keeps a fraction, such as adaspec"),
            "scope": (loss, competes, "a --selection that keeps a fraction, such as adaspec"),
            "outside_weight": (loss, selects, "a --selection"),
            "queue_rows": (loss, rule.scope == "queue", "--scope queue"),
            "reference": (loss, "reference_ce" in rule.selection.needs, "--selection adaspec"),
            "initial": (loss, "initial_ce" in rule.selection.needs, "--selection static_gap"),
            "beta": (loss, loss.objective == "jsd", "--objective jsd"),
            "label_weight": (loss, loss.objective != "label_nll", "another --objective"),
            "denominator": (loss, selects, "a --selection"),
            "pack_length": (self.batches, self.batches.packing, "--packing true"),
            "lora_alpha": (draft, draft.lora_rank is not None, "--lora_rank"),
            "lora_dropout": (draft, draft.lora_rank is not None, "--lora_rank"),
            "lora_targets": (draft, draft.lora_rank is not None, "--lora_rank"),
            "revision": (draft, draft.draft is not None, "--draft"),
            "cache_bytes": (self.store, self.store.cache_dir is not None, "--cache_dir"),
            "eval_documents": (self.store, self.store.eval_fraction > 0, "--eval_fraction"),
        }
        for name, (group, is_used, wanted) in uses.items():
            value = getattr(group, name)
            if not is_used and value != getattr(type(group)(), name):
                raise ValueError(
                    f"{name} must be left out where nothing heeds it, got {name}={value}; leave it out, or add {wanted}"
                )

    def objective(self) -> Objective:
        """Returns what is minimised."""
        return make_objective(self.loss.objective, beta=self.loss.beta, label_weight=self.loss.label_weight)

    def rule(self) -> Rule:
        """Returns which rows count."""
        loss = self.loss
        return make_rule(loss.selection, keep=loss.keep, scope=loss.scope, outside_weight=loss.outside_weight)

    def denominator(self) -> Denominator:
        """Returns what sums are divided by."""
        return "kept" if self.loss.denominator == "kept" else "masked"

    def losses(self) -> dict[str, str]:
        """Returns the names of the stores' losses that columns are."""
        given = {"reference_ce": self.loss.reference, "initial_ce": self.loss.initial}
        return {column: name for column, name in given.items() if name is not None}

    def source(self, seed: int) -> DraftSource:
        """Returns where the draft comes from."""
        asked = self.draft
        lora = None
        if asked.lora_rank is not None:
            targets = tuple(asked.lora_targets)
            lora = Lora(rank=asked.lora_rank, alpha=asked.lora_alpha, dropout=asked.lora_dropout, targets=targets)
        return DraftSource(
            draft=asked.draft,
            config=tuple(asked.draft_config),
            layers=asked.draft_layers,
            pad_vocab_size=asked.pad_vocab_size,
            lora=lora,
            revision=asked.revision,
            dtype=asked.dtype,
            attn_implementation=asked.attn_implementation,
            trust_remote_code=asked.trust_remote_code,
            seed=seed,
        )


class _Parser(RaisingErrors, HfArgumentParser):
    """HfArgumentParser for use within `user_errors`."""


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the description as it is."""


def _parser(description: str | None = None) -> _Parser:
    kinds = (*GROUPS, TrainingArguments)
    return _Parser(
        kinds,  # type: ignore[arg-type]
        allow_abbrev=False,
        description=description,
        formatter_class=_Formatter,
    )


def full_help(description: str) -> str:
    """Returns the help of all options, transformers' too."""
    parser = _parser(description)
    parser.set_defaults(**TRAINING_DEFAULTS)
    return parser.format_help()


def read_values(argv: list[str]) -> dict[str, Any]:
    """Reads all arguments: defaults, then the YAML file if the first argument is one, then flags.

    Raises:
        ValueError: Unknown keys or flags, or values of another type.
    """
    parser = _parser()
    parser.set_defaults(**TRAINING_DEFAULTS)
    if argv and not argv[0].startswith("-"):
        parser.set_defaults(**read_run(Path(argv[0]), known={*OURS, *THEIRS}))
        argv = argv[1:]
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{nearest(unknown[0])}")
    values = vars(known)
    for name in OURS:
        values[name] = _of_file(name, values[name])
    return values


def _of_file(name: str, value: object) -> object:
    """Makes of a value that a file gave what flags would have given; argparse does so for strings alone.

    Raises:
        ValueError: It is of another kind.
    """
    kind = LISTS.get(name)
    if isinstance(value, dict) or (isinstance(value, list) and kind is None):
        wanted = "one value" if kind is None else "a list"
        raise ValueError(f"{name} must be {wanted}, got {name}={value}; write it as flags have it")
    if kind is None or value is None:
        return value
    try:
        return [kind(each) for each in (value if isinstance(value, list) else [value])]
    except ValueError:
        raise ValueError(f"{name} must be a list of numbers, got {name}={value}; write such as [1, 0.5]") from None


def nearest(unknown: str) -> str:
    """Returns which known option an unknown one may be meant as."""
    name = unknown.partition("=")[0].lstrip("-").replace("-", "_")
    found = difflib.get_close_matches(name, [*OURS, *THEIRS], 1)
    return f" (did you mean --{found[0]}?)" if found else ""


def repeated(values: dict[str, Any]) -> dict[str, Any]:
    """Picks the values that repeat a run: what differs from transformers' defaults, and what these say of learning."""
    plain = vars(_parser().parse_args([]))
    ours = (name for name in OURS if name != "dry_run")
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

    Returns:
        This job's, transformers', and the values that they were made of.

    Raises:
        ValueError: Unknown keys or flags, or values that do not fit.
    """
    values = read_values(argv)
    return (*check(values), values)


def check(values: dict[str, Any]) -> tuple[RunArguments, TrainingArguments]:
    """Makes the arguments from their values, as `parse` does; chooses what is left open among them."""
    made: dict[str, Any] = {
        group._argument_group_name: group(**{f.name: values[f.name] for f in dataclasses.fields(group)})
        for group in GROUPS
    }
    run = RunArguments(**made)
    if not values["output_dir"]:
        raise ValueError("output_dir must be given, got none; add --output_dir")
    given = {name: values[name] for name in THEIRS} | {"output_dir": str(local_folder(values["output_dir"]))}
    if run.batches.num_workers is None:
        _check_precision(values)
    else:
        given |= DEVICE_OF_WORKERS
    run.source(values["seed"])
    check_supported(values)
    _check_evaluation(run, values)
    if values["greater_is_better"] is None:
        values["greater_is_better"] = greater_is_better(str(values["metric_for_best_model"]))
    training = TrainingArguments(**given | {"greater_is_better": values["greater_is_better"]})
    check_training_arguments(training)
    if run.batches.num_workers is None:
        check_optimizer(training)
    for name in training.report_to or []:
        if name not in get_available_reporting_integrations():
            raise ValueError(f"report_to must be installed here, got report_to={name}; pip install it, or leave it out")
    return run, training


def _check_precision(values: dict[str, Any]) -> None:
    """Raises ValueError, in words that name the flag, where transformers would refuse the device or fail later."""
    if values["use_cpu"] or is_torch_xla_available():
        return
    for name in ("bf16", "bf16_full_eval"):
        if values[name] and not is_torch_bf16_gpu_available():
            raise ValueError(
                f"{name} must be left out where no GPU computes in bfloat16, got {name}=True; leave it out, or add "
                "--use_cpu true to compute so on the CPU"
            )


def _check_evaluation(run: RunArguments, values: dict[str, Any]) -> None:
    """Raises ValueError where something is to be evaluated of nothing, or waited for that never comes."""
    strategy = getattr(values["eval_strategy"], "value", values["eval_strategy"])
    for name, value in {"eval_strategy": strategy, "eval_on_start": values["eval_on_start"]}.items():
        if value not in ("no", False) and not run.store.eval_fraction:
            raise ValueError(
                f"eval_fraction must be above 0 to evaluate, got eval_fraction=0 with {name}={value}; "
                "add --eval_fraction 0.01"
            )
    check_awaited({**values, "early_stopping": run.batches.early_stopping})
