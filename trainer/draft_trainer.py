"""DraftTrainer: transformers' Trainer on the documents of a store, without the target.

Ranks, mixed precision, accumulation, schedules, checkpoints and logging are Trainer's own. Here are the loss, the order
of the documents, what is logged beside the loss, and that what is saved is an ordinary Hugging Face model.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, Trainer

from trainer import checkpoints
from trainer.deal import Deal, Position
from trainer.lora import has_lora, load_lora
from trainer.progress import Progress, read_position
from trainer.steps import QUEUE_ROWS, Steps, num_rows
from trainer.stream import RankBatches, make_loader

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn
    from torch.utils.data import DataLoader
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

    from trainer.checkpoints import Remote
    from trainer.module import DraftModule
    from trainer.order import PackOrder
    from trainer.steps import Denominator
    from trainer.stream import DocumentDataset

UNSUPPORTED: dict[str, object] = {
    "eval_strategy": "no",
    "label_smoothing_factor": 0.0,
    "neftune_noise_alpha": None,
    "use_liger_kernel": False,
    "train_sampling_strategy": "random",
    "dataloader_in_order": True,
    "ignore_data_skip": False,
}
"""Training arguments that would go unheeded or fail late, and the value that they must have."""


def check_training_arguments(args: TrainingArguments) -> None:
    """Raises ValueError if the arguments ask for something that DraftTrainer does not do."""
    for name, value in UNSUPPORTED.items():
        if getattr(args, name) != value:
            raise ValueError(
                f"{name} must be {value}, got {name}={getattr(args, name)}; training from a store does without it"
            )
    if args.n_gpu > 1:
        raise ValueError(
            f"processes must be one for each GPU, got one for {args.n_gpu}; start the job with "
            f"torchrun --nproc_per_node {args.n_gpu}, or choose a GPU with CUDA_VISIBLE_DEVICES"
        )


def make_deal(args: TrainingArguments, order: PackOrder, batch_size: int | None = None) -> Deal:
    """Returns how packs are dealt to the ranks of this run.

    Args:
        args: Of the run.
        order: What is read.
        batch_size: Packs of a micro-batch on a rank; that of the arguments by default.

    Raises:
        ValueError: An epoch does not have as many packs as one step.
    """
    deal = Deal(
        per_device_batch=args.train_batch_size if batch_size is None else batch_size,
        ranks=args.world_size,
        accumulation=args.gradient_accumulation_steps,
        drop_last=args.dataloader_drop_last,
    )
    if not deal.num_steps(order.packs_per_epoch):
        raise ValueError(
            f"dataloader_drop_last must be False where an epoch has fewer packs than a step, got True with "
            f"{order.packs_per_epoch} packs and steps of {deal.packs_per_step}; leave it out, or give a smaller "
            "--per_device_train_batch_size"
        )
    return deal


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
            processing_class=tokenizer,
            callbacks=[Progress()],
        )
        self._module = module
        self._tokenizer = tokenizer
        self._dataset = dataset
        self._remote = remote
        self._begin = Position()
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
        try:
            return super()._inner_training_loop(batch_size, args, resume_from_checkpoint, trial, ignore_keys_for_eval)
        finally:
            self._dataset.close()

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
        # how often is logged and saved may be another than the checkpoint's
        self.state.compute_steps(self.args, max_steps)
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
        saved = len(list(Path(checkpoint).glob("steps_*.pth")))
        is_same = saved == self.args.world_size
        if saved:
            rank = self.args.process_index if is_same else 0
            state = torch.load(Path(checkpoint, f"steps_{rank}.pth"), map_location="cpu", weights_only=True)
            self._steps.restore(state, window=is_same)

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], None]:
        """Reads the micro-batches of an optimizer step and begins it; scores all rows first where they all compete."""
        batches = list(itertools.islice(epoch_iterator, num_batches))
        if batches:
            self._steps.begin(num_rows(batches))
        if batches and self._steps.needs_all_scores:
            batches = [self._prepare_inputs(batch) for batch in batches]
            with self.compute_loss_context_manager():
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
        """Runs the module and adds up what is logged. `num_items_in_batch` is not used: see `trainer.steps`."""
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

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Saves the draft, not the module around it; Trainer calls this for checkpoints and for the end."""
        if not self.args.should_save:
            return
        folder = str(output_dir or self.args.output_dir)
        draft = self._module.draft
        draft.generation_config = neutral_generation_config(draft)
        if state_dict is not None:  # gathered by Trainer from sharded parameters
            state_dict = {name.removeprefix("draft."): value for name, value in state_dict.items()}
        draft.save_pretrained(folder, state_dict=state_dict)
        self._tokenizer.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Loads a checkpoint's draft into the module's; the optimiser and the rest are Trainer's."""
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        draft = self._module.draft
        if has_lora(draft):
            load_lora(draft, resume_from_checkpoint)
            return
        # through from_pretrained, which knows tied weights, shards of files and renamed parameters
        saved = type(draft).from_pretrained(resume_from_checkpoint, dtype=draft.dtype)
        draft.load_state_dict(saved.state_dict())

    def _load_best_model(self) -> None:
        """Loads the best checkpoint's draft at the end, as one to go on from is loaded."""
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))


def neutral_generation_config(draft: PreTrainedModel) -> GenerationConfig:
    """Returns a generation config with the draft's special tokens and nothing else.

    A leftover repetition_penalty or temperature would distort what the draft proposes in speculative decoding.
    """
    old = draft.generation_config or GenerationConfig()
    return GenerationConfig(bos_token_id=old.bos_token_id, eos_token_id=old.eos_token_id, pad_token_id=old.pad_token_id)
