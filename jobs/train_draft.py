"""Trains a draft from a store. The target is not needed, and not loaded.

  python jobs/train_draft.py --store URL --draft MODEL --output_dir DIR [--selection adaspec --reference NAME]
  python jobs/train_draft.py run.yaml [--output_dir OTHER ...]     # keys are the flags' names; flags win
  torchrun --nproc_per_node 8 jobs/train_draft.py ...              # one process for each GPU
  ray job submit --working-dir . -- python jobs/train_draft.py ... --num_workers 8      # the same on a Ray cluster

DIR, a folder or a URL, becomes an ordinary Hugging Face model with its tokenizer; DIR/run.yaml repeats the run.
Every flag of transformers.TrainingArguments works too: --help_all shows them.
"""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _card import write_card
from _dry_run import describe
from _errors import refusals, user_errors
from _output import open_output
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
    write_state,
)
from _train_arguments import full_help, parse, read_values, repeated
from _train_options import help_text
from huggingface_hub.errors import HfHubHTTPError
from transformers import EarlyStoppingCallback, TrainerState

import logitstore
from logitstore.models.loading import loading_bars
from logitstore.models.probes import check_packing
from logitstore.storage.options import storage_options, without_credentials
from trainer.data.dataset import DocumentDataset
from trainer.data.sharding import make_deal
from trainer.drafts.reshaping import settle_padding
from trainer.drafts.source import make_draft, plan_draft
from trainer.evaluation.held_out import HeldOut
from trainer.loop.draft_trainer import DraftTrainer
from trainer.loop.position import is_stopped_early, read_position
from trainer.loss.draft_module import DraftModule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from _output import Output
    from _runs import Held
    from _train_arguments import RunArguments
    from transformers import TrainingArguments

    from logitstore import Store
    from trainer.drafts.source import DraftPlan


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a run is made of, before any weights are read."""

    run: RunArguments
    stores: list[Store]
    dataset: DocumentDataset
    held_out: HeldOut | None
    plan: DraftPlan


def find_start(held: Held, training: TrainingArguments, values: dict[str, Any]) -> TrainerState | str | None:
    """Decides where to begin, and refuses an output that holds another run.

    Returns:
        The state of a finished run, with nothing left to do; or a checkpoint's folder, or its URL in an output at a
        URL; or None to start from the draft.

    Raises:
        ValueError: The output is taken, or what is to go on is another run, or no checkpoint.
    """
    wanted = training.resume_from_checkpoint
    if wanted is None or wanted.lower() == "false":
        check_new(held)
        return None
    if RUN in held.names:
        before = read_values([str(held.folder / RUN)])
        check_same_run(held, before, values | {"store": [without_credentials(url) for url in values["store"]]})
    return find_finished(held, training) or find_checkpoint(held, wanted)


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
    stores = [store.read_smaller(k=asked.k, mass=asked.mass) for store in stores]
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
    held_out = None
    if asked.eval_fraction:
        held_out = HeldOut(dataset, at_most=asked.eval_documents, batch_size=training.eval_batch_size)
        if training.eval_strategy != "no":
            held_out.check_metric(str(training.metric_for_best_model))
    longest = max(stores, key=lambda store: store.spec.max_length)
    plan = plan_draft(run.source(training.seed), longest.spec)
    return Prepared(run=run, stores=stores, dataset=dataset, held_out=held_out, plan=plan)


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
        check_packing(module.split)
    return module


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Runs the job.

    Returns:
        steps, loss, train_runtime (seconds) and rows_per_second of the run, and eval_NAME of held-out documents;
        nothing of one that only asked.
    """
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help", "--help_all"} & {*argv}:
        print(full_help(str(__doc__)) if "--help_all" in argv else help_text(str(__doc__)))
        return {}
    with user_errors():
        run, training, values = parse(argv)
        output = open_output(values["output_dir"], storage_options(run.store.storage_options))
        workers = run.batches.num_workers
        # ranks on several machines have only what is at the URL in common
        on_one = workers is None and os.environ.get("WORLD_SIZE") == os.environ.get("LOCAL_WORLD_SIZE")
        with output.look(with_kept=on_one) as held:
            start = find_start(held, training, values)
    if run.batches.dry_run:
        with user_errors(), loading_bars(wanted=False):
            prepared = prepare(run, training)
            print(describe(prepared.dataset, make_module(prepared), prepared.plan, training, ranks=workers))
        return {}
    if isinstance(start, TrainerState):
        state = start
    elif workers is not None:
        from _ray_train import check_ray, train_on_ray  # Ray takes seconds, and need not be installed

        with user_errors():
            check_ray(workers)
            prepare(run, training)
        state = train_on_ray(output, values, repeated(values), start)
    else:
        with loading_bars(not training.disable_tqdm):
            with user_errors():
                prepared = prepare(run, training)
                module = make_module(prepared)
            with refusals(output.kept):
                state = train(prepared, module, training, output, repeated(values), start)
    found = figures(state)
    if training.process_index == 0:
        if state is start:
            print(f"{output.where} holds this run, finished after {state.global_step} steps: nothing is left to train")
        print(result_line(output.where, found))
    return found


def train(
    prepared: Prepared,
    module: DraftModule,
    training: TrainingArguments,
    output: Output,
    values: dict[str, Any],
    start: str | None,
) -> TrainerState:
    """Trains and saves.

    Args:
        prepared: What to train, from what.
        module: The draft.
        training: How.
        output: Where the files go.
        values: What run.yaml is to hold.
        start: The checkpoint to go on from, as `find_start` says; None starts from the draft.
    """
    run = prepared.run
    checkpoint = output.begin(training, start)
    if checkpoint is not None:
        with user_errors():
            read_position(checkpoint, prepared.dataset.order)
        reached = TrainerState.load_from_json(str(Path(checkpoint, STATE)))
        if is_stopped_early(reached):  # and killed before its model was saved
            training.max_steps = reached.global_step
    with user_errors(), of_hub():
        trainer = DraftTrainer(
            module,
            training,
            prepared.dataset,
            prepared.plan.tokenizer,
            held_out=prepared.held_out,
            denominator=run.denominator(),
            queue_rows=run.loss.queue_rows,
            remote=output.remote,
        )
    if run.batches.early_stopping is not None:
        trainer.add_callback(EarlyStoppingCallback(run.batches.early_stopping))
    folder = output.folder
    writes = trainer.is_world_process_zero()
    if writes:
        for note in prepared.plan.notes:
            print(note)
        if checkpoint is not None:
            kept = output.remote is not None and folder in Path(str(start)).parents
            step = TrainerState.load_from_json(str(Path(checkpoint, STATE))).global_step
            print(f"goes on after step {step}, from {start}{f', which did not reach {output.where}' if kept else ''}")
    # A finished model keeps its run.yaml and its state until the next one takes its place.
    if writes and not (folder / STATE).exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_run(folder, values)
        output.put_run()
    with loading_bars(wanted=False):  # each checkpoint that is written would have one, within that of the steps
        trainer.train(resume_from_checkpoint=checkpoint)
    settle_padding(module.draft, prepared.plan.vocab_size)
    if writes:
        (folder / STATE).unlink(missing_ok=True)
        specs, size = [store.spec for store in prepared.stores], module.draft.config.get_text_config().vocab_size
        write_card(run, training, specs, trainer.state, output.where, size)
    trainer.save_model()
    if writes:
        write_run(folder, values)
        write_state(folder, trainer.state)
        output.put_model()
    output.end(training)
    return trainer.state


@contextmanager
def of_hub() -> Iterator[None]:
    """Turns a hub that does not make a repository into a ValueError: `--push_to_hub` asks it for one at once.

    Raises:
        ValueError: It does not.
    """
    try:
        yield
    except (HfHubHTTPError, ConnectionError) as error:
        raise ValueError(
            f"push_to_hub must be left out where the hub cannot be written to, got push_to_hub=True ({error}); leave "
            "it out, or log in"
        ) from error


if __name__ == "__main__":
    main()
