"""Trains a draft from a store. The target is not needed, and not loaded.

    python jobs/train_draft.py --store URL --draft MODEL --output_dir DIR
    python jobs/train_draft.py --store URL --draft MODEL --output_dir DIR --selection adaspec --reference NAME
    python jobs/train_draft.py run.yaml [--output_dir OTHER ...]       # keys are the flags' names; flags win
    torchrun --nproc_per_node 8 jobs/train_draft.py ...                # one process for each GPU

Every flag of transformers.TrainingArguments works. DIR becomes an ordinary Hugging Face model with its tokenizer;
DIR/run.yaml repeats the run.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import yaml
from _errors import user_errors
from transformers import HfArgumentParser, TrainingArguments

import logitstore
from logitstore.causal_lm import (
    SplitLM,
    check_vocabulary,
    load_config,
    load_model,
    load_tokenizer,
    model_spec,
    tokenizer_spec,
)
from logitstore.storage import read_options, without_credentials
from trainer.draft_trainer import DraftModule, DraftTrainer, check_training_arguments
from trainer.objectives import OBJECTIVES
from trainer.selection import SELECTIONS
from trainer.stream import DocumentDataset, check_window

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from logitstore.spec import TokenizerSpec

TRAINING_DEFAULTS: dict[str, object] = {
    "logging_first_step": True,
    "logging_steps": 10,
    "save_total_limit": 2,
    "remove_unused_columns": False,
    # the loss hangs on every parameter, whatever rows a rank keeps
    "ddp_find_unused_parameters": False,
    # without a GPU torch warns that there is nothing to pin for
    "dataloader_pin_memory": torch.cuda.is_available(),
}
"""Where this job's defaults are not those of TrainingArguments; rates, schedules and sizes are transformers' own."""

NOT_REPEATED = frozenset({"resume_from_checkpoint", "hub_token", "local_rank", "dataloader_pin_memory"})
"""Training arguments that run.yaml leaves out: of one start or one machine only, or secret."""


@dataclass(frozen=True, kw_only=True)
class DraftArguments:
    """What to train, from what, and by which loss."""

    store: str = field(default="", metadata={"help": "URL or folder of the store (required)"})
    storage_options: str | None = field(
        default=None,
        metadata={"help": "JSON file with fsspec options for the store's URL, such as credentials"},
    )
    draft: str = field(default="", metadata={"help": "Hugging Face id or folder of the draft to start from (required)"})
    revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of the draft on the hub"})
    dtype: str = field(
        default="float32", metadata={"help": "of the weights; with --bf16 true float32 weights compute in bfloat16"}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, flash_attention_2, eager, ..."})
    trust_remote_code: bool = field(default=False, metadata={"help": "run code that comes with the draft"})
    objective: str = field(default="forward_kl", metadata={"help": " | ".join(OBJECTIVES)})
    selection: str = field(default="all", metadata={"help": "which rows count: " + " | ".join(SELECTIONS)})
    reference: str | None = field(
        default=None, metadata={"help": "name of the store's losses that adaspec compares with"}
    )
    keep: float = field(default=0.4, metadata={"help": "fraction of the rows that random and adaspec keep"})
    denominator: str = field(
        default="kept",
        metadata={"help": "what the summed loss is divided by: kept (AdaSPEC's paper) | masked (its code)"},
    )
    shuffle_window: int = field(default=4, metadata={"help": "shards among which documents are shuffled"})

    def __post_init__(self) -> None:
        for name in ("store", "draft"):
            if not getattr(self, name):
                raise ValueError(f"{name} must be given, got none; add --{name}")
        choices = {
            "objective": list(OBJECTIVES),
            "selection": list(SELECTIONS),
            "denominator": ["kept", "masked"],
            "dtype": ["auto", "float32", "bfloat16", "float16"],
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {name}={getattr(self, name)}; change --{name}")
        if not 0.0 < self.keep <= 1.0:
            raise ValueError(f"keep must be above 0 and at most 1, got keep={self.keep}; 0.4 is usual")
        if SELECTIONS[self.selection].needs_losses and self.reference is None:
            raise ValueError(
                f"reference must be given with selection={self.selection}, got reference=None; "
                "add --reference NAME, where NAME is that of jobs/dump_logits.py --reference NAME=MODEL"
            )
        check_window(self.shuffle_window)


class _Parser(HfArgumentParser):
    """Reports what it cannot parse like every other mistake, not by a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"arguments must parse, got: {message}; see --help")


def parse(argv: list[str]) -> tuple[DraftArguments, TrainingArguments, dict[str, Any]]:
    """Reads the arguments: defaults, then the YAML file if the first argument is one, then flags.

    Returns:
        Both kinds of arguments, and the values that repeat the run.

    Raises:
        ValueError: Unknown keys or flags, or values that do not fit.
    """
    kinds = (DraftArguments, TrainingArguments)
    parser = _Parser(kinds, allow_abbrev=False, description=__doc__)  # type: ignore[arg-type]
    ours = [f.name for f in dataclasses.fields(DraftArguments)]
    theirs = [f.name for f in dataclasses.fields(TrainingArguments) if f.init]
    plain = vars(parser.parse_args([]))
    parser.set_defaults(**TRAINING_DEFAULTS)
    if argv and not argv[0].startswith("-"):
        parser.set_defaults(**_read_run(argv[0], known={*ours, *theirs}))
        argv = argv[1:]
    values = vars(parser.parse_args(argv))
    draft = DraftArguments(**{name: values[name] for name in ours})
    if not values["output_dir"]:
        raise ValueError("output_dir must be given, got none; add --output_dir")
    repeated = {name: values[name] for name in ours} | {"store": without_credentials(draft.store)}
    repeated |= {name: values[name] for name in theirs if values[name] != plain[name] and name not in NOT_REPEATED}
    training = TrainingArguments(**{name: values[name] for name in theirs})
    check_training_arguments(training)
    return draft, training, repeated


def _read_run(path: str, known: set[str]) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not YAML ({type(error).__name__})"
        raise ValueError(f"run file must be a readable YAML file, got {path}: {reason}; see --help") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"run file must be a file of `name: value` lines, got {path}, which holds something else")
    if unknown := sorted(set(values) - known):
        raise ValueError(f"run file must have the names of flags only, got {unknown[0]!r} in {path}; see --help")
    # argparse converts and checks defaults that are strings, as if they were flags: 3e-4 is a string to YAML
    return {k: v if v is None or isinstance(v, list | dict) else str(v) for k, v in values.items()}


def find_checkpoint(training: TrainingArguments) -> str | None:
    """Decides where to go on, and refuses an output directory that holds another run.

    Returns:
        A checkpoint folder, or None to start from the draft. `--resume_from_checkpoint true` takes the last finished
        checkpoint of the output directory, if there is one.

    Raises:
        ValueError: The named checkpoint is none, or the output directory is taken.
    """
    wanted = training.resume_from_checkpoint
    folder = Path(str(training.output_dir))
    # the trainer's state is written last: without it the folder is what a killed run left
    finished = [p.parent for p in folder.glob("checkpoint-*/trainer_state.json")]
    if wanted is not None and wanted.lower() == "true":
        last = max(finished, key=lambda p: int(p.name.rpartition("-")[2]), default=None)
        return None if last is None else str(last)
    if wanted is not None and wanted.lower() != "false":
        if not Path(wanted, "trainer_state.json").is_file():
            raise ValueError(
                f"resume_from_checkpoint must be a finished checkpoint folder or true, got "
                f"resume_from_checkpoint={wanted}; there is no trainer_state.json in it"
            )
        return wanted
    if folder.is_file() or any(folder.glob("checkpoint-*")) or any(folder.glob("config.json")):
        raise ValueError(
            f"output_dir must be new or empty, got output_dir={folder}, which holds another run; give another "
            "--output_dir, or --resume_from_checkpoint true to go on with it"
        )
    return None


def check_draft(args: DraftArguments, made: TokenizerSpec) -> PreTrainedTokenizerBase:
    """Compares the draft's tokenizer and configuration with the store's tokenizer, and reads no weights.

    Returns:
        The draft's own tokenizer.

    Raises:
        ValueError: They do not fit.
    """
    tokenizer = load_tokenizer(args.draft, revision=args.revision, trust_remote_code=args.trust_remote_code)
    found = tokenizer_spec(tokenizer, uses_chat_template=False)
    if found.fingerprint != made.fingerprint:
        raise ValueError(
            f"draft must have the tokenizer that the store was made with ({made.name}, {made.vocab_size} tokens, "
            f"{made.fingerprint[:19]}), got draft={args.draft} ({found.vocab_size} tokens, {found.fingerprint[:19]}); "
            "give a draft of the target's family"
        )
    config = load_config(args.draft, revision=args.revision, trust_remote_code=args.trust_remote_code)
    check_vocabulary(model_spec(args.draft, config, args.dtype), made, "draft")
    return tokenizer


def load_draft(args: DraftArguments, vocab_size: int) -> PreTrainedModel:
    """Loads the draft onto the CPU, from where Trainer moves it.

    Raises:
        ValueError: It has no weights, or an architecture whose head cannot be taken apart from its backbone.
    """
    try:
        draft = load_model(
            args.draft,
            revision=args.revision,
            dtype=args.dtype,
            attn_implementation=args.attn_implementation,
            trust_remote_code=args.trust_remote_code,
            device="cpu",
        )
    except OSError as error:
        raise ValueError(f"draft must have weights, got draft={args.draft}: {error}") from error
    SplitLM(draft, vocab_size).check()
    return draft


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Runs the job.

    Returns:
        steps, loss, train_runtime (seconds) and rows_per_second of the run.
    """
    with user_errors():
        args, training, run = parse(sys.argv[1:] if argv is None else argv)
        checkpoint = find_checkpoint(training)
        store = logitstore.open(args.store, read_options(args.storage_options))
        selection = SELECTIONS[args.selection]
        if args.reference is not None:
            store.loss(args.reference)
        dataset = DocumentDataset(store, args.reference if selection.needs_losses else None)
        tokenizer = check_draft(args, store.spec.tokenizer)
        draft = load_draft(args, store.spec.tokenizer.vocab_size)

    module = DraftModule(
        draft,
        vocab_size=store.spec.tokenizer.vocab_size,
        objective=OBJECTIVES[args.objective],
        selection=selection,
        keep=args.keep,
        denominator="kept" if args.denominator == "kept" else "masked",
    )
    trainer = DraftTrainer(module, training, dataset, tokenizer, shuffle_window=args.shuffle_window)
    folder = Path(str(training.output_dir))
    if trainer.is_world_process_zero():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.yaml").write_text(yaml.safe_dump(run, sort_keys=False), encoding="utf-8")
    outcome = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()
    metrics = {
        "steps": float(outcome.global_step),
        "loss": outcome.training_loss,
        "train_runtime": outcome.metrics["train_runtime"],
        "rows_per_second": outcome.metrics["train_rows_per_second"],
    }
    if trainer.is_world_process_zero():
        print(json.dumps({"draft": str(folder), **metrics}))
    return metrics


if __name__ == "__main__":
    main()
