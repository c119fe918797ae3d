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
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from _errors import user_errors
from _runs import (
    NOT_REPEATED,
    RUN,
    STATE,
    check_new,
    check_same_run,
    figures,
    find_checkpoint,
    find_finished,
    read_run,
    result_line,
    write_run,
)
from transformers import HfArgumentParser, TrainingArguments
from transformers.utils.import_utils import is_torch_bf16_gpu_available, is_torch_xla_available

import logitstore
from logitstore.arguments import RaisingErrors
from logitstore.causal_lm import SplitLM, check_model
from logitstore.drivers import without_credentials
from logitstore.options import storage_options
from logitstore.reader import CACHE_BYTES
from logitstore.views import smaller
from logitstore.weights import load_weights, loading_bars
from trainer.draft_trainer import DraftTrainer, check_training_arguments
from trainer.module import DraftModule
from trainer.objectives import OBJECTIVES
from trainer.selection import SELECTIONS
from trainer.stream import DocumentDataset, check_window

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerState

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


@dataclass(frozen=True, kw_only=True)
class DraftArguments:
    """What to train, from what, and by which loss."""

    store: str = field(default="", metadata={"help": "URL or folder of the store (required)"})
    storage_options: str | None = field(
        default=None,
        metadata={"help": "JSON file with fsspec options for the store's URL, such as credentials"},
    )
    cache_dir: str | None = field(
        default=None, metadata={"help": "local folder that keeps what is read from a bucket; processes may share it"}
    )
    cache_bytes: int = field(default=CACHE_BYTES, metadata={"help": "the most that --cache_dir may grow to"})
    k: int | None = field(
        default=None, metadata={"help": "read the store as if it had been dumped with this --k, no larger than its own"}
    )
    mass: float | None = field(
        default=None, metadata={"help": "read the store as if it had been dumped with --scheme nucleus and this --mass"}
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


OURS = tuple(f.name for f in dataclasses.fields(DraftArguments))
THEIRS = tuple(f.name for f in dataclasses.fields(TrainingArguments) if f.init)


class _Parser(RaisingErrors, HfArgumentParser):
    """HfArgumentParser for use within `user_errors`."""


def _parser() -> _Parser:
    kinds = (DraftArguments, TrainingArguments)
    return _Parser(kinds, allow_abbrev=False, description=__doc__)  # type: ignore[arg-type]


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
    return vars(parser.parse_args(argv))


def repeated(values: dict[str, Any]) -> dict[str, Any]:
    """Picks the values that repeat a run: what differs from transformers' defaults, or has one of this job's own."""
    plain = vars(_parser().parse_args([]))
    theirs = (
        name
        for name in THEIRS
        if name not in NOT_REPEATED and (values[name] != plain[name] or name in TRAINING_DEFAULTS)
    )
    return {name: values[name] for name in (*OURS, *theirs)} | {"store": without_credentials(values["store"])}


def parse(argv: list[str]) -> tuple[DraftArguments, TrainingArguments, dict[str, Any]]:
    """Reads and checks the arguments.

    Returns:
        Both kinds of arguments, and the values that they were made of.

    Raises:
        ValueError: Unknown keys or flags, or values that do not fit.
    """
    values = read_values(argv)
    draft = DraftArguments(**{name: values[name] for name in OURS})
    if not values["output_dir"]:
        raise ValueError("output_dir must be given, got none; add --output_dir")
    _check_precision(values)
    training = TrainingArguments(**{name: values[name] for name in THEIRS})
    check_training_arguments(training)
    return draft, training, values


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


def find_start(training: TrainingArguments, values: dict[str, Any]) -> TrainerState | str | None:
    """Decides where to begin, and refuses an output directory that holds another run.

    Returns:
        The state of a finished run, with nothing left to do; or a checkpoint folder; or None to start from the draft.

    Raises:
        ValueError: The output directory is taken, or what is to go on is another run, or no checkpoint.
    """
    folder = Path(str(training.output_dir))
    wanted = training.resume_from_checkpoint
    if wanted is None or wanted.lower() == "false":
        check_new(folder)
        return None
    if (folder / RUN).exists():
        before = read_values([str(folder / RUN)])
        check_same_run(folder, before, values | {"store": without_credentials(values["store"])})
    return find_finished(folder, training) or find_checkpoint(folder, wanted)


def load_draft(args: DraftArguments, vocab_size: int) -> PreTrainedModel:
    """Loads the draft onto the CPU, from where Trainer moves it.

    Raises:
        ValueError: Its weights cannot be read, or its head cannot be taken apart from its backbone.
    """
    draft = load_weights(
        args.draft,
        what="draft",
        revision=args.revision,
        dtype=args.dtype,
        attn_implementation=args.attn_implementation,
        trust_remote_code=args.trust_remote_code,
        device="cpu",
    )
    SplitLM(draft, vocab_size).check()
    return draft


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Runs the job.

    Returns:
        steps, loss, train_runtime (seconds) and rows_per_second of the run.
    """
    with user_errors():
        args, training, values = parse(sys.argv[1:] if argv is None else argv)
        start = find_start(training, values)
    folder = Path(str(training.output_dir))
    if start is None or isinstance(start, str):
        with loading_bars(not training.disable_tqdm):
            state = train(args, training, repeated(values), start)
    else:
        state = start
    found = figures(state)
    if training.process_index == 0:
        if state is start:
            print(f"{folder} holds this run, finished after {state.global_step} steps: nothing is left to train")
        print(result_line(folder, found))
    return found


def train(
    args: DraftArguments, training: TrainingArguments, run: dict[str, Any], checkpoint: str | None
) -> TrainerState:
    """Trains and saves.

    Args:
        args: What to train, from what.
        training: How.
        run: What run.yaml is to hold.
        checkpoint: Folder to go on from; None starts from the draft.
    """
    with user_errors():
        store = logitstore.open(
            args.store,
            storage_options(args.storage_options),
            cache_dir=args.cache_dir,
            cache_bytes=args.cache_bytes,
        )
        store = smaller(store, k=args.k, mass=args.mass)
        selection = SELECTIONS[args.selection]
        if args.reference is not None:
            store.loss(args.reference)
        dataset = DocumentDataset(store, args.reference if selection.needs_losses else None)
        made = store.spec.tokenizer
        _, tokenizer = check_model(
            args.draft,
            what="draft",
            made=made,
            max_length=store.spec.max_length,
            revision=args.revision,
            dtype=args.dtype,
            trust_remote_code=args.trust_remote_code,
        )
        draft = load_draft(args, made.vocab_size)

    module = DraftModule(
        draft,
        vocab_size=made.vocab_size,
        objective=OBJECTIVES[args.objective],
        selection=selection,
        keep=args.keep,
        denominator="kept" if args.denominator == "kept" else "masked",
    )
    trainer = DraftTrainer(module, training, dataset, tokenizer, shuffle_window=args.shuffle_window)
    folder = Path(str(training.output_dir))
    writes = trainer.is_world_process_zero()
    # A finished model keeps its run.yaml and its state until the next one takes its place.
    if writes and not (folder / STATE).exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_run(folder, run)
    trainer.train(resume_from_checkpoint=checkpoint)
    if writes:
        (folder / STATE).unlink(missing_ok=True)
    trainer.save_model()
    if writes:
        write_run(folder, run)
    trainer.save_state()
    return trainer.state


if __name__ == "__main__":
    main()
