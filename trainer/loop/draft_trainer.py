"""DraftTrainer: transformers' Trainer on the documents of a store, without the target.

Ranks, mixed precision, accumulation, schedules, checkpoints and logging are Trainer's own. Here are the loss, the order
of the documents, what is logged beside the loss, what is evaluated, and that an ordinary Hugging Face model is saved.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast
from transformers import GenerationConfig, SchedulerType, Trainer

from trainer.data.loader import RankBatches, make_loader
from trainer.data.sharding import Position, make_deal
from trainer.drafts.lora import has_lora, load_lora, merge_lora
from trainer.loop import checkpoints
from trainer.loop.position import AtTheEnd, Progress, note_callbacks, read_position
from trainer.loop.refused_arguments import check_training_arguments
from trainer.loop.step_accounting import QUEUE_ROWS, Steps, num_rows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn
    from torch.utils.data import DataLoader
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

    from trainer.data.dataset import DocumentDataset
    from trainer.data.sharding import Deal
    from trainer.evaluation.held_out import HeldOut
    from trainer.loop.remote_checkpoints import Remote
    from trainer.loop.step_accounting import Denominator
    from trainer.loss.draft_module import DraftModule


class DraftTrainer(Trainer):
    """Trains a draft on the target rows of a store."""

    loss_is_scaled_for_ga = True  # of a whole step, by `trainer.steps`

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
            module: The draft, and what is minimised.
            args: Of transformers.
            dataset: What is read, and in which order.
            tokenizer: Saved with the draft.
            held_out: What the draft is evaluated on as the arguments say, and at the end.
            denominator: What a step's sum is divided by.
            queue_rows: Recent rows whose scores the scope `queue` compares with.
            remote: Where finished checkpoints are copied to.

        Raises:
            ValueError: The arguments ask for something that is not done here.
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
        self.callback_handler.callbacks.insert(0, AtTheEnd(self._end))
        self._module = module
        self._tokenizer = tokenizer
        self._dataset = dataset
        self._remote = remote
        self._begin = Position()
        self._held_out = held_out
        self._evaluated: int | None = None
        self._steps = Steps(module.rule, denominator, self.accelerator, queue_rows)

    @property
    def _deal(self) -> Deal:
        return make_deal(self.args, self._dataset.order, self._train_batch_size)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Makes the loader of this rank, which begins where `_run_epoch` says; accelerate has nothing to share out."""
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
        """Reads where a checkpoint goes on, before anything is counted."""
        self._begin = Position()
        if resume_from_checkpoint is not None:
            self._begin = read_position(resume_from_checkpoint, self._dataset.order)
        self._check_together()
        try:
            return super()._inner_training_loop(batch_size, args, resume_from_checkpoint, trial, ignore_keys_for_eval)
        finally:
            self._dataset.close()

    def _check_together(self) -> None:
        """Raises ValueError if ranks begin at different steps: they would wait for each other without a word."""
        own = torch.tensor([self._begin.steps], device=self.args.device)
        steps = self.accelerator.gather(own).tolist()
        if len(set(steps)) > 1:
            raise ValueError(
                f"resume_from_checkpoint must find the same checkpoint on every rank, got steps={steps} by rank; give "
                "an --output_dir that all machines share, a folder or a URL"
            )

    def set_initial_training_values(
        self, args: TrainingArguments, dataloader: DataLoader[Any]
    ) -> tuple[int, int, int, int, int, int, int]:
        """Counts epochs and steps from where the run goes on, whatever the size of a step was until there."""
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
        """Begins at the checkpoint's epoch; what of it is done, `_run_epoch` leaves out."""
        super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        # how often is logged and saved may be another than the checkpoint's, and so may what calls back
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
        """Runs an epoch from where it goes on, as if it began there: Trainer then restores random numbers at once."""
        order, deal = self._dataset.order, self._deal
        packs = self._begin.packs if epoch == self._begin.epoch else 0
        self._batches.begin(epoch, packs)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, Progress):
                callback.begin(order, deal, epoch, packs)
        if epoch == self._begin.epoch:
            logged = [int(entry["step"]) for entry in self.state.log_history if "loss" in entry]
            self._globalstep_last_logged = max(logged, default=0)
        if not len(self._batches) or self.state.global_step >= self.state.max_steps:
            # the checkpoint was made at the last step: what is left is that callbacks hear of the end
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
        """Saves a checkpoint of all ranks, finishes it with a record, and only then deletes older ones."""
        run = Path(self._get_output_dir(trial))
        folder = run / f"{checkpoints.PREFIX}{self.state.global_step}"
        if self.args.should_save:
            checkpoints.remove(folder)  # what a killed run may have left there
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self._remote is not None:
            checkpoints.gather(folder, self.args.process_index)  # each machine has a folder of its own
        if not self.args.should_save:
            return
        checkpoints.write_record(folder)
        best = self.state.best_model_checkpoint
        checkpoints.rotate(run, limit, {folder, *([] if best is None else [Path(best)])})
        if self._remote is not None and self.is_world_process_zero():
            self._remote.upload(folder)
            self._remote.rotate(limit, {folder.name, *([] if best is None else [Path(best).name])})

    def _save_rng_state(self, output_dir: str) -> None:
        """Saves the state of this rank: random numbers, and what the steps add up."""
        super()._save_rng_state(output_dir)
        torch.save(self._steps.state(), Path(output_dir, f"steps_{self.args.process_index}.pth"))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restores the state of this rank; of another number of ranks' only what they share."""
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
        """Reads the micro-batches of an optimizer step and begins it; scores all rows first where they all compete."""
        batches = list(itertools.islice(epoch_iterator, num_batches))
        if batches:
            self._steps.begin(num_rows(batches))
        if batches and self._steps.needs_all_scores:
            batches = [self._prepare_inputs(batch) for batch in batches]
            self._module.train()  # as Trainer has it from the first step on
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
        """Runs a micro-batch forward and backward; after the last one of a step, its gradients are what they should."""
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
        """Runs the module and adds up what is logged. `num_items_in_batch` is not used."""
        outputs = model(**inputs, **self._steps.compared())
        self._steps.add(outputs)
        loss = self._steps.scaled(outputs["loss"])
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds to what Trainer logs what `Steps.statistics` says of the steps since the last time, over all ranks."""
        if "loss" in logs:
            logs.update(self._steps.statistics())
        elif "train_runtime" in logs:
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
        """Evaluates the draft as it is now, on all ranks; logs the figures and has callbacks act on them.

        Args:
            eval_dataset: What the draft is evaluated on; by default what the trainer was given.
            ignore_keys: Of no use here, where no outputs are gathered.
            metric_key_prefix: Before the names of the figures.

        Returns:
            What `HeldOut.evaluate` says, under PREFIX_NAME.

        Raises:
            ValueError: There is nothing to evaluate on.
        """
        held_out = self._held_out if eval_dataset is None else eval_dataset
        if held_out is None:
            raise ValueError("held_out must be given to evaluate, got none; make a HeldOut of trainer.evaluation")
        with self.accelerator.autocast():
            found = held_out.evaluate(self._module.split, self.accelerator)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self._evaluated = self.state.global_step
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:  # noqa: ANN401
        """Has a schedule that follows a metric follow it to the better side, whichever that is."""
        args = self.args
        if args.lr_scheduler_type in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY):
            given: dict[str, Any] = args.lr_scheduler_kwargs or {}  # type: ignore[assignment]  # no string any more
            args.lr_scheduler_kwargs = {"mode": "max" if args.greater_is_better else "min"} | given
        return super().create_scheduler(num_training_steps, optimizer)

    def _end(self) -> None:
        """Ends the training before trackers are told so: the draft is an ordinary model again, and evaluated."""
        note_callbacks(self.state, self.callback_handler.callbacks)
        if self.args.load_best_model_at_end:
            # of all ranks, whether or not they see the checkpoint: it may be in a folder of another machine
            broadcast(dict(self._module.draft.state_dict()))
            if self.state.best_global_step != self.state.global_step:
                self._evaluated = None
        if has_lora(self._module.draft):
            merge_lora(self._module.draft)
            self._evaluated = None
        if self._held_out is not None and self._evaluated != self.state.global_step:
            self.evaluate()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Saves the draft, not the module around it; Trainer calls this for checkpoints and for the end."""
        if not self.args.should_save:
            return
        folder = str(output_dir or self.args.output_dir)
        draft = self._module.draft
        draft.generation_config = neutral_generation_config(draft)
        draft.save_pretrained(folder)
        self._tokenizer.save_pretrained(folder)

    def create_model_card(self, *args: object, **kwargs: object) -> None:
        """Writes nothing over the card that the job wrote; Trainer calls this before it uploads a model."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Loads a checkpoint's draft into the module's; the optimiser and the rest are Trainer's."""
        draft = self._module.draft
        if has_lora(draft):
            load_lora(draft, resume_from_checkpoint)
            return
        # through from_pretrained, which knows tied weights, shards of files and renamed parameters
        saved = type(draft).from_pretrained(resume_from_checkpoint, dtype=draft.dtype)
        draft.load_state_dict(saved.state_dict())

    def _load_best_model(self) -> None:
        """Loads the best checkpoint's draft, on the process that saved it; `_end` gives it to the others."""
        if self.is_world_process_zero():
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))


def neutral_generation_config(draft: PreTrainedModel) -> GenerationConfig:
    """Returns a generation config with the draft's special tokens and nothing else.

    A leftover repetition_penalty or temperature would distort what the draft proposes in speculative decoding.
    """
    old = draft.generation_config or GenerationConfig()
    return GenerationConfig(bos_token_id=old.bos_token_id, eos_token_id=old.eos_token_id, pad_token_id=old.pad_token_id)
