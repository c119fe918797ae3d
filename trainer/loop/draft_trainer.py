"""DraftTrainer: transformers' Trainer, changed to train a draft on the documents of a store, without the target.

Trainer provides ranks, mixed precision, accumulation, schedules, checkpoints and logging. This module adds the loss,
the order of the documents, more logged statistics and the evaluation. The draft is saved as a Hugging Face model.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast
from transformers import SchedulerType, Trainer

from trainer.data.loader import RankBatches, make_loader
from trainer.data.sharding import Position, make_deal
from trainer.drafts.lora import has_lora, load_lora, merge_lora
from trainer.drafts.reshaping import neutral_generation_config
from trainer.loop import checkpoints
from trainer.loop.position import AtTheEnd, Progress, note_callbacks, read_position
from trainer.loop.refused_arguments import check_training_arguments
from trainer.loop.step_accounting import QUEUE_ROWS, Steps, num_rows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn
    from torch.utils.data import DataLoader
    from transformers import PreTrainedTokenizerBase, TrainingArguments

    from trainer.data.dataset import DocumentDataset
    from trainer.data.sharding import Deal
    from trainer.evaluation.held_out import HeldOut
    from trainer.loop.remote_checkpoints import Remote
    from trainer.loop.step_accounting import Denominator
    from trainer.loss.draft_module import DraftModule


class DraftTrainer(Trainer):
    """Trainer of a draft on the target rows of a store."""

    # `Steps` divides the loss by the denominator of the whole step, so Trainer must not divide the loss again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        module: DraftModule,
        args: TrainingArguments,
        dataset: DocumentDataset,
        tokenizer: PreTrainedTokenizerBase,
        *,
        held_out: HeldOut | None = None,
        denominator: Denominator = "kept",
        queue_rows: int = QUEUE_ROWS,
        remote: Remote | None = None,
    ) -> None:
        """Prepares a run.

        Args:
            module: The draft with its objective and its rule for the selection of rows.
            args: Training arguments of transformers.
            dataset: The documents to train on, in the order of the training.
            tokenizer: The tokenizer that is saved with the draft.
            held_out: Documents for all evaluations, the final one included; None for no evaluations.
            denominator: Name of the number by which the weighted loss sum of a step is divided; see `DENOMINATORS`.
            queue_rows: Number of recent rows that each row competes with if the rule's scope is `queue`.
            remote: Copies finished checkpoints to a URL; None keeps checkpoints on the local disk only.

        Raises:
            ValueError: The arguments request something that DraftTrainer does not support.
        """
        check_training_arguments(args)
        make_deal(args, dataset.order)
        super().__init__(
            model=module,
            args=args,
            train_dataset=dataset,
            eval_dataset=held_out,
            processing_class=tokenizer,
            callbacks=[Progress()],
        )
        # AtTheEnd comes first, so that the final evaluation is logged before other callbacks close their trackers.
        self.callback_handler.callbacks.insert(0, AtTheEnd(self._end))
        self._module = module
        self._tokenizer = tokenizer
        self._dataset = dataset
        self._remote = remote
        self._begin = Position()
        self._held_out = held_out
        self._evaluated: int | None = None  # Step at which the current weights were evaluated.
        self._steps = Steps(module.rule, denominator, self.accelerator, queue_rows)

    @property
    def _deal(self) -> Deal:
        return make_deal(self.args, self._dataset.order, self._train_batch_size)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Returns a loader of this rank's own batches. `_run_epoch` sets the pack at which the loader starts."""
        args = self.args
        self._batches = RankBatches(self._dataset.order, self._deal, args.process_index)
        return make_loader(
            self._dataset,
            self._batches,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            prefetch_factor=args.dataloader_prefetch_factor,
            persistent_workers=args.dataloader_persistent_workers,
            multiprocessing_context=args.dataloader_multiprocessing_context,
        )

    def _inner_training_loop(
        self,
        batch_size: int | None = None,
        args: TrainingArguments | None = None,
        resume_from_checkpoint: str | None = None,
        trial: object = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:  # noqa: ANN401
        """Checks that all ranks start at the same step, and trains from the checkpoint's position or from the start."""
        self._begin = Position()
        if resume_from_checkpoint is not None:
            self._begin = read_position(resume_from_checkpoint, self._dataset.order)
        self._check_together()
        try:
            return super()._inner_training_loop(batch_size, args, resume_from_checkpoint, trial, ignore_keys_for_eval)
        finally:
            self._dataset.close()

    def _check_together(self) -> None:
        """Raises ValueError if the ranks start at different steps. Such ranks would wait for each other forever."""
        own = torch.tensor([self._begin.steps], device=self.args.device)
        steps = self.accelerator.gather(own).tolist()
        if len(set(steps)) > 1:
            raise ValueError(
                f"resume_from_checkpoint must find the same checkpoint on every rank, got the steps {steps}; give "
                "an --output_dir that all machines share, a folder or a URL"
            )

    def set_initial_training_values(
        self, args: TrainingArguments, dataloader: DataLoader[Any]
    ) -> tuple[int, int, int, int, int, int, int]:
        """Returns the numbers of epochs, steps, packs and micro-batches. Totals include the part before a resume."""
        deal, packs = self._deal, self._dataset.order.packs_per_epoch
        max_steps = args.max_steps
        if max_steps <= 0:
            max_steps = self._begin.num_steps(packs, deal, epochs=args.num_train_epochs)
        return (
            self._begin.num_epochs(packs, deal, max_steps=max_steps),
            deal.num_steps(packs),
            packs,
            max_steps * deal.packs_per_step,
            deal.packs_per_step,
            deal.num_batches(packs),
            max_steps,
        )

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: object,
    ) -> tuple[int, int]:
        """Returns the checkpoint's epoch, and 0 steps to skip: `_run_epoch` skips the packs already trained on."""
        super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        # The run that saved the checkpoint may have had other callbacks, and other logging and saving intervals.
        self.state.compute_steps(self.args, max_steps)
        note_callbacks(self.state, self.callback_handler.callbacks)
        return self._begin.epoch, 0

    def _run_epoch(
        self,
        model: nn.Module,
        epoch: int,
        train_dataloader: DataLoader[Any],
        steps_in_epoch: int,
        num_update_steps_per_epoch: int,
        trial: object,
        ignore_keys_for_eval: list[str] | None,
        start_time: float,
        resume_from_checkpoint: str | None,
        epochs_trained: int,
        steps_trained_in_current_epoch: int,
    ) -> None:
        """Trains on the remaining packs of an epoch.

        Trainer gets these packs as a full epoch, so in a resumed run it restores the random state before the first one.
        """
        order, deal = self._dataset.order, self._deal
        packs = self._begin.packs if epoch == self._begin.epoch else 0
        self._batches.begin(epoch, packs)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, Progress):
                callback.begin(order, deal, epoch, packs)
        if epoch == self._begin.epoch:
            # Trainer assumes that the checkpoint's step was logged. The log history tells which step was logged last.
            logged = [int(entry["step"]) for entry in self.state.log_history if "loss" in entry]
            self._globalstep_last_logged = max(logged, default=0)
        if not len(self._batches) or self.state.global_step >= self.state.max_steps:
            # The checkpoint was saved at the last step, so only the callbacks at the end of the epoch are still due.
            self._load_rng_state(resume_from_checkpoint)
            self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
            self._maybe_log_save_evaluate(self._tr_loss, None, model, trial, epoch, ignore_keys_for_eval, start_time)
            return
        super()._run_epoch(  # type: ignore[no-untyped-call]
            model=model,
            epoch=epoch,
            train_dataloader=train_dataloader,
            steps_in_epoch=len(self._batches),
            num_update_steps_per_epoch=deal.num_steps(order.packs_per_epoch - packs),
            trial=trial,
            ignore_keys_for_eval=ignore_keys_for_eval,
            start_time=start_time,
            resume_from_checkpoint=resume_from_checkpoint,
            epochs_trained=epochs_trained,
            steps_trained_in_current_epoch=0,
        )

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        """Saves a checkpoint of all ranks, marks it as finished with a record, and then deletes older checkpoints."""
        run = Path(self._get_output_dir(trial))
        folder = run / f"{checkpoints.PREFIX}{self.state.global_step}"
        if self.args.should_save:
            checkpoints.remove(folder)  # A killed run may have left an unfinished checkpoint of this step.
        self.accelerator.wait_for_everyone()
        # Trainer gets no limit and so deletes nothing: older checkpoints must stay until this one is finished.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self._remote is not None:
            checkpoints.gather(folder, self.args.process_index)  # With a URL, machines may share no folder.
        if not self.args.should_save:
            return
        checkpoints.write_record(folder)
        best = self.state.best_model_checkpoint
        checkpoints.rotate(run, limit, {folder, *([] if best is None else [Path(best)])})
        if self._remote is not None and self.is_world_process_zero():
            self._remote.upload(folder)
            self._remote.rotate(limit, {folder.name, *([] if best is None else [Path(best).name])})

    def _save_rng_state(self, output_dir: str) -> None:
        """Saves the state of this rank: the random state, and the state of the step accounting."""
        super()._save_rng_state(output_dir)
        torch.save(self._steps.state(), Path(output_dir, f"steps_{self.args.process_index}.pth"))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restores the state of this rank. If the number of ranks changed, restores only what all ranks share."""
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        saved, rank, ranks = Path(checkpoint), self.args.process_index, self.args.world_size
        is_there = (saved / f"steps_{rank}.pth").is_file() and not (saved / f"steps_{ranks}.pth").exists()
        fits = self.accelerator.reduce(torch.tensor(float(is_there), device=self.args.device), "sum")
        path = saved / f"steps_{rank if is_there else 0}.pth"
        if path.is_file():
            state = torch.load(path, map_location="cpu", weights_only=True)
            self._steps.restore(state, window=int(fits) == ranks)

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], None]:
        """Reads the micro-batches of an optimizer step and starts the step.

        If all rows of a step compete to be kept, they are all scored here, before any of them is trained on.

        Returns:
            The micro-batches, and None in place of the number of items, because `Steps` counts the rows itself.
        """
        batches = list(itertools.islice(epoch_iterator, num_batches))
        if batches:
            self._steps.begin(num_rows(batches))
        if batches and self._steps.needs_all_scores:
            batches = [self._prepare_inputs(batch) for batch in batches]
            # The scores must be computed in training mode, to which Trainer switches only later, in `training_step`.
            self._module.train()
            with self.accelerator.autocast():
                scored = [self._module.scores(**batch) for batch in batches]
            for _, known in scored:
                self._steps.note(known)
            scores = [own for own, _ in scored]
            others = self._steps.gather(torch.cat(scores))
            batches = [batch | {"scores": own, "others": others} for batch, own in zip(batches, scores, strict=True)]
        return batches, None

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Runs a micro-batch forward and backward. After the last micro-batch of a step, rescales the gradients."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._steps.finish(model)
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Runs the module on a micro-batch, adds the results to the statistics, and returns the scaled loss.

        If `return_outputs` is true, also returns the outputs of the module. `num_items_in_batch` is ignored, because
        `Steps` counts the rows itself.
        """
        outputs = model(**inputs, **self._steps.compared())
        self._steps.add(outputs)
        loss = self._steps.scaled(outputs["loss"])
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs Trainer's values, and statistics of the steps since the last log, over all ranks."""
        if "loss" in logs:
            logs.update(self._steps.statistics())
        elif "train_runtime" in logs:
            # `statistics` adds unlogged steps to the totals. Trainer's mean loss is dropped: it ignores denominators.
            self._steps.statistics()
            logs.pop("train_loss", None)
            logs.update(self._steps.totals(logs["train_runtime"]))
        super().log(logs, start_time)

    def evaluate(  # type: ignore[override]
        self,
        eval_dataset: HeldOut | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluates the draft with its current weights on all ranks, logs the metrics and passes them to the callbacks.

        Returns the values of `HeldOut.evaluate`, with the prefix before each name. `ignore_keys` has no effect.
        """
        held_out = self._held_out if eval_dataset is None else eval_dataset
        if held_out is None:
            raise ValueError("held_out must be given to evaluate, got None; pass a trainer.evaluation.held_out.HeldOut")
        with self.accelerator.autocast():
            found = held_out.evaluate(self._module.split, self.accelerator)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self._evaluated = self.state.global_step
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:  # noqa: ANN401
        """Creates the schedule. A schedule that follows a metric is told whether a greater metric is better."""
        args = self.args
        if args.lr_scheduler_type in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY):
            # The type allows a dict or a string, but TrainingArguments has already parsed a string into a dict.
            given: dict[str, Any] = args.lr_scheduler_kwargs or {}  # type: ignore[assignment]
            args.lr_scheduler_kwargs = {"mode": "max" if args.greater_is_better else "min"} | given
        return super().create_scheduler(num_training_steps, optimizer)

    def _end(self) -> None:
        """Completes the draft after training: sends the best weights to all processes, merges a LoRA, and evaluates."""
        note_callbacks(self.state, self.callback_handler.callbacks)
        if self.args.load_best_model_at_end:
            # Only the main process loaded the best checkpoint, because the folders of other machines may lack it.
            broadcast(dict(self._module.draft.state_dict()))
            if self.state.best_global_step != self.state.global_step:
                self._evaluated = None
        if has_lora(self._module.draft):
            merge_lora(self._module.draft)
            self._evaluated = None
        if self._held_out is not None and self._evaluated != self.state.global_step:
            self.evaluate()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Saves the draft without the module around it. Trainer calls this for checkpoints and at the end."""
        if not self.args.should_save:
            return
        folder = str(output_dir or self.args.output_dir)
        draft = self._module.draft
        draft.generation_config = neutral_generation_config(draft)
        draft.save_pretrained(folder)
        self._tokenizer.save_pretrained(folder)

    def create_model_card(self, *args: object, **kwargs: object) -> None:
        """Does nothing. Trainer's own method, called before an upload, would replace this project's model card."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Loads the draft of a checkpoint into the module. Trainer itself loads the optimizer and all other state."""
        draft = self._module.draft
        if has_lora(draft):
            load_lora(draft, resume_from_checkpoint)
            return
        # from_pretrained handles tied weights, weights in several files and renamed parameters.
        saved = type(draft).from_pretrained(resume_from_checkpoint, dtype=draft.dtype)
        draft.load_state_dict(saved.state_dict())

    def _load_best_model(self) -> None:
        """Loads the best draft on the main process, which saved it. `_end` sends it to the other processes."""
        if self.is_world_process_zero():
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))
