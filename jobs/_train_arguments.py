"""The arguments of train_draft.py: its own in groups, transformers' TrainingArguments beside them, and a file of both.

Values come from the dataclasses, then from a YAML file, then from flags; a name that nobody knows is refused with the
nearest one that is known.
"""

from __future__ import annotations

import dataclasses
import difflib
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from _output import local_folder
from _runs import NOT_REPEATED, read_run
from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.utils.import_utils import is_torch_bf16_gpu_available, is_torch_xla_available

from logitstore.arguments import RaisingErrors
from logitstore.drivers import without_credentials
from logitstore.reader import CACHE_BYTES
from trainer.drafts import DraftSource
from trainer.evaluating import greater_is_better
from trainer.lora import ALL_LINEAR, Lora
from trainer.objectives import OBJECTIVES, Objective, make_objective
from trainer.order import MAX_WINDOW, check_eval_fraction, check_window
from trainer.selection import SCOPES, SELECTIONS, Rule, make_rule
from trainer.steps import DENOMINATORS, QUEUE_ROWS, Denominator
from trainer.unsupported import check_awaited, check_supported, check_training_arguments

HELP_WIDTH = 118
COLUMN = 29
"""Where the lines of help begin."""

TRAINING_DEFAULTS: dict[str, object] = {
    "logging_first_step": True,
    "logging_steps": 10,
    "save_total_limit": 2,
    "metric_for_best_model": "alpha_estimate",
    # how often evaluations were no better, for early stopping
    "restore_callback_states_from_checkpoint": True,
    "remove_unused_columns": False,
    # the loss hangs on every parameter, whatever rows a rank keeps
    "ddp_find_unused_parameters": False,
    # without a GPU torch warns that there is nothing to pin for
    "dataloader_pin_memory": torch.cuda.is_available(),
}
"""Where this job's defaults are not those of TrainingArguments; rates, schedules and sizes are transformers' own."""

DEVICE_OF_WORKERS: dict[str, object] = {"use_cpu": True, "tf32": None}
"""What this process leaves to workers: it may have no GPU where they have one."""


def said(metavar: str, text: str) -> dict[str, str]:
    """Returns the metadata of an option: what stands for its value, and a line of help with its unit."""
    return {"metavar": metavar, "help": text}


@dataclass(frozen=True, kw_only=True)
class StoreArguments:
    """What is read."""

    _argument_group_name: ClassVar[str] = "store"

    store: list[str] = field(
        default_factory=list, metadata=said("URL", "one store or several of one tokenizer (required)")
    )
    store_weights: list[float] | None = field(
        default=None, metadata=said("X", "passes over each store in an epoch [1 each]")
    )
    eval_fraction: float = field(
        default=0.0, metadata=said("X", "fraction of the documents held out, by what is in them")
    )
    eval_documents: int = field(default=512, metadata=said("N", "most documents of these that an evaluation reads"))
    k: int | None = field(
        default=None, metadata=said("N", "read as if dumped by --scheme topk with so many entries a row")
    )
    mass: float | None = field(
        default=None, metadata=said("P", "read as if dumped by --scheme nucleus with this probability")
    )
    storage_options: str | None = field(
        default=None, metadata=said("FILE", "JSON with fsspec options for the stores' and output's URLs")
    )
    cache_dir: str | None = field(
        default=None, metadata=said("DIR", "keeps what is read from a bucket; processes may share it")
    )
    cache_bytes: int = field(default=CACHE_BYTES, metadata=said("BYTES", "the most that --cache_dir grows to"))


@dataclass(frozen=True, kw_only=True)
class DraftArguments:
    """Where the draft comes from."""

    _argument_group_name: ClassVar[str] = "draft"

    draft: str | None = field(
        default=None, metadata=said("MODEL", "Hugging Face id or folder of the draft to begin with")
    )
    draft_config: list[str] = field(
        default_factory=list,
        metadata=said(
            "C", "random weights instead: a config.json, folder or id, then key=value such as hidden_size=256"
        ),
    )
    draft_layers: str | None = field(
        default=None, metadata=said("L", "cut from --draft: so many layers evenly spaced, or these: 0,9,27")
    )
    pad_vocab_size: str | None = field(
        default=None, metadata=said("N", "rows of the embeddings, a number or target: vLLM wants them equal")
    )
    lora_rank: int | None = field(default=None, metadata=said("N", "train a LoRA of this rank, merged in the end"))
    lora_alpha: float = field(default=32.0, metadata=said("X", "its updates are scaled by alpha / rank"))
    lora_dropout: float = field(default=0.0, metadata=said("P", "of its inputs"))
    lora_targets: list[str] = field(
        default_factory=lambda: [ALL_LINEAR], metadata=said("NAME", "linear layers that it adapts")
    )
    revision: str | None = field(default=None, metadata=said("REV", "branch, tag or commit of the draft on the hub"))
    dtype: str = field(default="float32", metadata=said("TYPE", "of the weights, auto is the draft's; see --bf16 too"))
    attn_implementation: str | None = field(
        default=None, metadata=said("NAME", "sdpa, flash_attention_2, eager, ... [transformers' choice]")
    )
    trust_remote_code: bool = field(default=False, metadata=said("BOOL", "run code that comes with the draft"))


@dataclass(frozen=True, kw_only=True)
class LossArguments:
    """What is minimised, and at which rows."""

    _argument_group_name: ClassVar[str] = "loss"

    objective: str = field(default="forward_kl", metadata=said("NAME", f"{' | '.join(OBJECTIVES)}"))
    beta: float = field(default=0.5, metadata=said("X", "of jsd, between 0 and 1"))
    label_weight: float = field(
        default=0.0, metadata=said("X", "share of the text's own cross entropy in the loss, 0 to 1")
    )
    selection: str = field(default="all", metadata=said("NAME", f"which rows count: {' | '.join(SELECTIONS)}"))
    keep: float = field(default=0.4, metadata=said("X", "fraction of the rows that a selection keeps"))
    scope: str | None = field(
        default=None, metadata=said("NAME", f"of which rows: {' | '.join(SCOPES)} [the selection's own]")
    )
    queue_rows: int = field(default=QUEUE_ROWS, metadata=said("N", "recent rows that scope queue compares with"))
    outside_weight: float = field(default=0.0, metadata=said("X", "weight of rows that are not kept, 0 to 1"))
    reference: str | None = field(
        default=None, metadata=said("NAME", "the stores' losses that adaspec and static_gap compare with")
    )
    initial: str | None = field(
        default=None, metadata=said("NAME", "the stores' losses of the draft as it is now, for static_gap")
    )
    denominator: str = field(
        default="kept", metadata=said("NAME", "divides the sum: kept (AdaSPEC's paper) | masked (its code)")
    )


@dataclass(frozen=True, kw_only=True)
class BatchArguments:
    """How documents become batches, and who runs them."""

    _argument_group_name: ClassVar[str] = "batches"

    packing: bool = field(
        default=False, metadata=said("BOOL", "documents share rows of a batch, and see nothing of each other")
    )
    pack_length: int | None = field(
        default=None, metadata=said("N", "most tokens of such a row [the longest document's]")
    )
    shuffle_window: int = field(
        default=MAX_WINDOW, metadata=said("N", "shards among which documents are shuffled, 1 to 4")
    )
    num_workers: int | None = field(
        default=None, metadata=said("N", "train on so many Ray workers, one GPU each if there are any")
    )
    early_stopping: int | None = field(
        default=None, metadata=said("N", "stop after so many evaluations that are no better than the best")
    )
    dry_run: bool = field(
        default=False, metadata=said("BOOL", "everything but the steps: checks, sizes, an estimate of memory")
    )


GROUPS = (StoreArguments, DraftArguments, LossArguments, BatchArguments)
OURS = tuple(f.name for group in GROUPS for f in dataclasses.fields(group))
THEIRS = tuple(f.name for f in dataclasses.fields(TrainingArguments) if f.init)

CHOICES: dict[str, tuple[str, ...]] = {
    "denominator": DENOMINATORS,
    "dtype": ("auto", "float32", "bfloat16", "float16"),
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
        needs = self.rule().selection.needs
        for name, column in {"reference": "reference_ce", "initial": "initial_ce"}.items():
            if column in needs and getattr(self.loss, name) is None:
                raise ValueError(
                    f"{name} must be given with selection={self.loss.selection}, got {name}=None; "
                    f"add --{name} NAME, where NAME is that of jobs/dump_logits.py --reference NAME=MODEL"
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


def _parser(description: str | None = None) -> _Parser:
    kinds = (*GROUPS, TrainingArguments)
    return _Parser(kinds, allow_abbrev=False, description=description)  # type: ignore[arg-type]


def help_text(description: str) -> str:
    """Returns the help of the job's own options, for one screen; defaults in brackets."""
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


def full_help(description: str) -> str:
    """Returns the help of all options, transformers' too."""
    return _parser(description).format_help()


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
    for name in ("store", "draft_config", "lora_targets", "store_weights"):
        if isinstance(values[name], str | float | int):  # of a file that names one alone
            values[name] = [values[name]]
    return values


def nearest(unknown: str) -> str:
    """Returns which known option an unknown one may be meant as."""
    name = unknown.partition("=")[0].lstrip("-").replace("-", "_")
    found = difflib.get_close_matches(name, [*OURS, *THEIRS], 1)
    return f" (did you mean --{found[0]}?)" if found else ""


def repeated(values: dict[str, Any]) -> dict[str, Any]:
    """Picks the values that repeat a run: what differs from transformers' defaults, or has one of this job's own."""
    plain = vars(_parser().parse_args([]))
    ours = (name for name in OURS if name != "dry_run")
    theirs = (
        name
        for name in THEIRS
        if name not in NOT_REPEATED and (values[name] != plain[name] or name in TRAINING_DEFAULTS)
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
            other = "give --fp16 true" if torch.cuda.is_available() else "add --use_cpu true to compute so on the CPU"
            raise ValueError(
                f"{name} must be left out where no GPU computes in bfloat16, got {name}=True; leave it out, or {other}"
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
