"""Trains a draft from a store. The target is not needed, and not loaded.

  python jobs/train_draft.py --store URL --draft MODEL --output_dir DIR [--selection adaspec --reference NAME]
  python jobs/train_draft.py run.yaml [--output_dir OTHER ...]     # keys are the flags' names; flags win
  torchrun --nproc_per_node 8 jobs/train_draft.py ...              # one process for each GPU

DIR becomes an ordinary Hugging Face model with its tokenizer; DIR/run.yaml repeats the run.
Every flag of transformers.TrainingArguments works too: --help_all shows them.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _dry_run import describe
from _errors import user_errors
from _runs import (
    RUN,
    STATE,
    check_new,
    check_same_run,
    figures,
    find_checkpoint,
    find_finished,
    result_line,
    write_run,
)
from _train_arguments import full_help, help_text, parse, read_values, repeated
from transformers import EarlyStoppingCallback

import logitstore
from logitstore.drivers import without_credentials
from logitstore.options import storage_options
from logitstore.views import smaller
from logitstore.weights import loading_bars
from trainer.draft_trainer import DraftTrainer, make_deal
from trainer.drafts import make_draft, plan_draft
from trainer.module import DraftModule
from trainer.stream import DocumentDataset

if TYPE_CHECKING:
    from _train_arguments import RunArguments
    from transformers import TrainerState, TrainingArguments

    from logitstore import Store
    from trainer.drafts import DraftPlan


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a run is made of, before any weights are read."""

    run: RunArguments
    stores: list[Store]
    dataset: DocumentDataset
    plan: DraftPlan


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
        check_same_run(folder, before, values | {"store": [without_credentials(url) for url in values["store"]]})
    return find_finished(folder, training) or find_checkpoint(folder, wanted)


def prepare(run: RunArguments, training: TrainingArguments) -> Prepared:
    """Opens the stores, and checks that the draft can be trained on them as asked.

    Raises:
        ValueError: It cannot.
        LogitStoreError: A store cannot be read, or is not finished.
    """
    asked, rule, objective = run.store, run.rule(), run.objective()
    options = storage_options(asked.storage_options)
    stores = [
        logitstore.open(url, options, cache_dir=asked.cache_dir, cache_bytes=asked.cache_bytes) for url in asked.store
    ]
    stores = [smaller(store, k=asked.k, mass=asked.mass) for store in stores]
    for store in stores:
        objective.check(store.spec.target)
        rule.selection.check(store.spec.target, run.loss.selection)
        for name in (run.loss.reference, run.loss.initial):
            if name is not None:
                store.loss(name)
    dataset = DocumentDataset(
        stores,
        columns=rule.selection.columns,
        losses=run.losses(),
        reads_target=objective.divergence is not None or rule.selection.reads_target,
        weights=asked.store_weights,
        packing=run.batches.packing,
        pack_length=run.batches.pack_length,
        eval_fraction=asked.eval_fraction,
        shuffle_window=run.batches.shuffle_window,
        seed=training.seed if training.data_seed is None else training.data_seed,
    )
    make_deal(training, dataset.order)
    longest = max(stores, key=lambda store: store.spec.max_length)
    return Prepared(run=run, stores=stores, dataset=dataset, plan=plan_draft(run.source(training.seed), longest.spec))


def make_module(prepared: Prepared) -> DraftModule:
    """Makes the draft, with what it is trained on.

    Raises:
        ValueError: Its weights cannot be read, or its architecture cannot be trained as asked.
    """
    run = prepared.run
    module = DraftModule(
        make_draft(prepared.plan), vocab_size=prepared.plan.vocab_size, objective=run.objective(), rule=run.rule()
    )
    if run.batches.packing:
        module.split.check_packing()
    return module


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Runs the job.

    Returns:
        steps, loss, train_runtime (seconds) and rows_per_second of the run; nothing of one that only asked.
    """
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help", "--help_all"} & {*argv}:
        print(full_help(str(__doc__)) if "--help_all" in argv else help_text(str(__doc__)))
        return {}
    with user_errors():
        run, training, values = parse(argv)
        start = find_start(training, values)
    folder = Path(str(training.output_dir))
    if run.batches.dry_run:
        with user_errors(), loading_bars(wanted=False):
            prepared = prepare(run, training)
            print(describe(prepared.dataset, make_module(prepared), prepared.plan, training))
        return {}
    if start is None or isinstance(start, str):
        with loading_bars(not training.disable_tqdm):
            state = train(run, training, repeated(values), start)
    else:
        state = start
    found = figures(state)
    if training.process_index == 0:
        if state is start:
            print(f"{folder} holds this run, finished after {state.global_step} steps: nothing is left to train")
        print(result_line(folder, found))
    return found


def train(
    run: RunArguments, training: TrainingArguments, values: dict[str, Any], checkpoint: str | None
) -> TrainerState:
    """Trains and saves.

    Args:
        run: What to train, from what.
        training: How.
        values: What run.yaml is to hold.
        checkpoint: Folder to go on from; None starts from the draft.
    """
    with user_errors():
        prepared = prepare(run, training)
        module = make_module(prepared)
    trainer = DraftTrainer(
        module,
        training,
        prepared.dataset,
        prepared.plan.tokenizer,
        denominator=run.denominator(),
        queue_rows=run.loss.queue_rows,
    )
    if run.batches.early_stopping is not None:
        trainer.add_callback(EarlyStoppingCallback(run.batches.early_stopping))
    folder = Path(str(training.output_dir))
    writes = trainer.is_world_process_zero()
    if writes:
        for note in prepared.plan.notes:
            print(note)
    # A finished model keeps its run.yaml and its state until the next one takes its place.
    if writes and not (folder / STATE).exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_run(folder, values)
    trainer.train(resume_from_checkpoint=checkpoint)
    if writes:
        (folder / STATE).unlink(missing_ok=True)
    trainer.save_model()
    if writes:
        write_run(folder, values)
    trainer.save_state()
    return trainer.state


if __name__ == "__main__":
    main()
