"""Training run: opens the stores, then makes, trains and saves the draft. Raises errors, and never prints."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import HfHubHTTPError
from transformers import EarlyStoppingCallback, TrainerState

import logitstore
from logitstore.models.loading import loading_bars
from logitstore.models.probes import check_packing
from trainer.data.dataset import DocumentDataset
from trainer.data.sharding import make_deal
from trainer.drafts.reshaping import settle_padding
from trainer.drafts.source import make_draft, plan_draft
from trainer.evaluation.held_out import HeldOut
from trainer.loop.draft_trainer import DraftTrainer
from trainer.loop.position import is_stopped_early, read_position
from trainer.loss.draft_module import DraftModule
from trainer.run.model_card import write_card
from trainer.run.run_folder import (
    STATE,
    write_run,
    write_state,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import TrainingArguments

    from logitstore import Store
    from trainer.drafts.source import DraftPlan
    from trainer.run.options import RunArguments
    from trainer.run.output import Output


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Parts of a run that are ready before any weights are loaded."""

    run: RunArguments
    stores: list[Store]
    dataset: DocumentDataset
    """Documents that are trained on."""
    held_out: HeldOut | None
    """Documents for evaluations; None if none are held out."""
    plan: DraftPlan
    """Plan from which the draft will be made."""


def prepare(run: RunArguments, training: TrainingArguments, options: dict[str, Any] | None) -> Prepared:
    """Opens the stores, and checks that the draft can be trained on them with these options.

    Args:
        run: Options of this project.
        training: Training arguments of transformers.
        options: fsspec options of the stores' URLs.

    Raises:
        ValueError: The stores, the draft and the options do not fit together.
        LogitStoreError: A store cannot be read, or lacks a finished layer that the run needs.
    """
    asked, rule, objective = run.store, run.rule(), run.objective()
    stores = [
        logitstore.open(url, options, cache_dir=asked.cache_dir, cache_bytes=asked.cache_bytes) for url in asked.store
    ]
    stores = [store.read_smaller(k=asked.k, mass=asked.mass) for store in stores]
    for store in stores:
        objective.check(store.spec.target)
        rule.selection.check(store.spec.target, run.loss.selection)
        for name in (run.loss.reference, run.loss.initial):
            # Raises an error now, before the slow steps, if the store lacks these losses.
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
    # Raises ValueError now, before weights are loaded, if dataloader_drop_last leaves an epoch without steps.
    make_deal(training, dataset.order)
    held_out = None
    if asked.eval_fraction:
        held_out = HeldOut(dataset, at_most=asked.eval_documents, batch_size=training.eval_batch_size)
        if training.eval_strategy != "no":
            held_out.check_metric(str(training.metric_for_best_model))
    # The draft must be able to hold the longest documents of all stores.
    longest = max(stores, key=lambda store: store.spec.max_length)
    plan = plan_draft(run.source(training.seed), longest.spec)
    return Prepared(run=run, stores=stores, dataset=dataset, held_out=held_out, plan=plan)


def make_module(prepared: Prepared) -> DraftModule:
    """Loads or creates the draft, and combines it with its objective and its selection of rows.

    Args:
        prepared: The parts that `prepare` returned.

    Raises:
        ValueError: The weights cannot be read, or the architecture cannot be trained with these options.
    """
    run = prepared.run
    module = DraftModule(
        make_draft(prepared.plan), vocab_size=prepared.plan.vocab_size, objective=run.objective(), rule=run.rule()
    )
    if run.batches.packing:
        check_packing(module.split)
    return module


def make_trainer(
    prepared: Prepared, module: DraftModule, training: TrainingArguments, output: Output, checkpoint: str | None
) -> DraftTrainer:
    """Builds the trainer of a run.

    Args:
        prepared: The stores, documents and draft of the run.
        module: The draft with its loss.
        training: Training arguments of transformers.
        output: Folder or URL of the run's files.
        checkpoint: Folder of the checkpoint to resume from; None starts from the draft.

    Raises:
        ValueError: The checkpoint belongs to another order of documents, or the Hugging Face hub refuses to create the
            repository that `--push_to_hub` needs.
    """
    if checkpoint is not None:
        # Raises ValueError now if the checkpoint belongs to another order of documents.
        read_position(checkpoint, prepared.dataset.order)
        reached = TrainerState.load_from_json(str(Path(checkpoint, STATE)))
        # If early stopping had ended the training before the run was killed, the resumed run only saves the model.
        if is_stopped_early(reached):
            training.max_steps = reached.global_step
    with _hub_errors():
        trainer = DraftTrainer(
            module,
            training,
            prepared.dataset,
            prepared.plan.tokenizer,
            held_out=prepared.held_out,
            denominator=prepared.run.denominator(),
            queue_rows=prepared.run.loss.queue_rows,
            remote=output.remote,
        )
    if prepared.run.batches.early_stopping is not None:
        trainer.add_callback(EarlyStoppingCallback(prepared.run.batches.early_stopping))
    return trainer


def first_lines(prepared: Prepared, output: Output, checkpoint: str | None, start: str | None) -> list[str]:
    """Returns the lines printed before the first step: notes on the draft, and the checkpoint to resume from."""
    lines = list(prepared.plan.notes)
    if checkpoint is not None:
        kept = output.remote is not None and output.folder in Path(str(start)).parents
        step = TrainerState.load_from_json(str(Path(checkpoint, STATE))).global_step
        lines.append(
            f"resumes after step {step}, from {start}{f', which was not copied to {output.where}' if kept else ''}"
        )
    return lines


def train(
    prepared: Prepared,
    module: DraftModule,
    trainer: DraftTrainer,
    output: Output,
    values: dict[str, Any],
    checkpoint: str | None,
) -> TrainerState:
    """Trains and saves the draft.

    Args:
        prepared: The stores, documents and draft of the run.
        module: The draft with its loss.
        trainer: The trainer that `make_trainer` built.
        output: Folder or URL of the run's files.
        values: Contents of run.yaml.
        checkpoint: Folder of the checkpoint to resume from; None starts from the draft.

    Returns:
        The state of the finished training.
    """
    folder, training, draft = output.folder, trainer.args, module.draft
    # Files that belong to the whole run are written by one process only.
    writes = trainer.is_world_process_zero()
    # An earlier finished model in the folder keeps its run.yaml and state until the new model is saved.
    if writes and not (folder / STATE).exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_run(folder, values)
        output.put_run()
    with loading_bars(wanted=False):  # Each save would show a bar inside the bar of the steps.
        trainer.train(resume_from_checkpoint=checkpoint)
    # The padding rows of the head must hold the mean of its other rows, which training has changed.
    settle_padding(draft, prepared.plan.vocab_size)
    if writes:
        # trainer_state.json marks a finished model, so it is deleted before the files of the model are replaced.
        (folder / STATE).unlink(missing_ok=True)
        specs, size = [store.spec for store in prepared.stores], draft.config.get_text_config().vocab_size
        write_card(prepared.run, training, specs, trainer.state, output.where, size)
    trainer.save_model()
    if writes:
        # The folder may still hold the run.yaml of an earlier model, which the new model has replaced.
        write_run(folder, values)
        write_state(folder, trainer.state)
        output.put_model()
    output.end(training)
    return trainer.state


@contextmanager
def _hub_errors() -> Iterator[None]:
    """Context manager that turns errors of the Hugging Face hub into ValueError.

    With `--push_to_hub`, building the trainer creates a repository on the hub.

    Raises:
        ValueError: The hub did not create the repository.
    """
    try:
        yield
    except (HfHubHTTPError, ConnectionError) as error:
        raise ValueError(
            f"push_to_hub needs write access to the Hugging Face hub, got push_to_hub=True ({error}); log in, "
            "or omit --push_to_hub"
        ) from error
