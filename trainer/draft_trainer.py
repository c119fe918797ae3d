"""DraftTrainer: transformers' Trainer on the documents of a store, without the target.

Ranks, mixed precision, accumulation, schedules, checkpoints and logging are Trainer's own. Here are the loss, the order
of the documents, what is logged beside the loss, and that what is saved is an ordinary Hugging Face model.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from transformers import GenerationConfig, Trainer, TrainerCallback

from trainer.stream import WindowShuffleSampler, collate

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import (
        PreTrainedModel,
        PreTrainedTokenizerBase,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )

    from trainer.module import DraftModule
    from trainer.stream import DocumentDataset

UNSUPPORTED: dict[str, object] = {
    "eval_strategy": "no",
    "label_smoothing_factor": 0.0,
    "neftune_noise_alpha": None,
    "use_liger_kernel": False,
    "train_sampling_strategy": "random",
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


class _TellEpoch(TrainerCallback):
    """Tells the sampler its epoch.

    accelerate forwards the epoch through one wrapper of the batch sampler; when several ranks resume in mid-epoch
    there are two, and the sampler would repeat epoch 0.
    """

    def __init__(self, sampler: WindowShuffleSampler) -> None:
        self._sampler = sampler

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Runs before the epoch's first batch is asked for."""
        self._sampler.set_epoch(int(state.epoch))


class DraftTrainer(Trainer):
    """Trains a draft on the target rows of a store.

    With gradient accumulation and on several ranks, the means of the micro-batches are averaged with equal weight.
    """

    loss_is_scaled_for_ga = False

    def __init__(
        self,
        module: DraftModule,
        args: TrainingArguments,
        dataset: DocumentDataset,
        tokenizer: PreTrainedTokenizerBase,
        *,
        shuffle_window: int,
    ) -> None:
        check_training_arguments(args)
        seed = args.seed if args.data_seed is None else args.data_seed
        self._sampler = WindowShuffleSampler(dataset.documents_per_shard, shuffle_window, seed)
        super().__init__(
            model=module,
            args=args,
            train_dataset=dataset,
            data_collator=collate,
            processing_class=tokenizer,
            callbacks=[_TellEpoch(self._sampler)],
        )
        self._module = module
        self._tokenizer = tokenizer
        self._sums: dict[str, Tensor | float] = {}
        self._rows = 0.0
        self._since = time.monotonic()

    def _get_train_sampler(self, train_dataset: object = None) -> WindowShuffleSampler:
        return self._sampler

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: object,
    ) -> tuple[int, int]:
        """Begins beyond the last epoch where a checkpoint has all steps: Trainer itself would make one more."""
        begin: tuple[int, int] = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        return (num_train_epochs, 0) if self.state.global_step >= max_steps else begin

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Runs the module and adds up what is logged. `num_items_in_batch` is not used: a loss is a mean of its own."""
        outputs = model(**inputs)
        values = {name: value.detach() for name, value in outputs.items() if name != "loss"}
        values["rows"] = values["kept"].new_tensor(len(inputs["rows"]))
        values["batches"] = torch.ones_like(values["rows"])
        self._sums = {name: value + self._sums.get(name, 0.0) for name, value in values.items()}
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds to what Trainer logs the statistics of the micro-batches since the last time, over all ranks.

        kl: mean KL(p‖draft), nats, of all masked rows; under a random selection of the kept ones, a fair sample.
        label_nll: the mean negative logprob of the text itself, likewise.
        kept_fraction, denominator: kept rows over masked rows; rows that a micro-batch's loss was divided by.
        gap_threshold: mean loss gap that a row had to reach (adaspec).
        rows_per_second: masked rows, all ranks together; whole ones, as Trainer prints others like 3.197e+04.
        """
        ends = "train_runtime" in logs
        if self._sums and ("loss" in logs or ends):
            statistics = self._statistics()
            logs.update({} if ends else statistics)
        if ends:
            logs["train_rows_per_second"] = round(self._rows / max(logs["train_runtime"], 1e-9))
            if not self._rows:  # the checkpoint was the last one: Trainer's mean over no step is 0
                logs.pop("train_loss", None)
        super().log(logs, start_time)

    def _statistics(self) -> dict[str, float]:
        names = sorted(self._sums)
        stacked = torch.stack([torch.as_tensor(self._sums[name], dtype=torch.float32) for name in names])
        sums = dict(zip(names, self.accelerator.reduce(stacked, "sum").tolist(), strict=True))
        now = time.monotonic()
        seconds, self._since, self._sums = now - self._since, now, {}
        self._rows += sums["rows"]
        known = max(1.0, sums["known"])
        found = {
            "kl": sums["kl"] / known,
            "label_nll": sums["label_nll"] / known,
            "kept_fraction": sums["kept"] / max(1.0, sums["rows"]),
            "denominator": sums["denominator"] / sums["batches"],
            "rows_per_second": round(sums["rows"] / max(seconds, 1e-9)),
        }
        if self._module.reads_reference and sums["thresholds"]:
            found["gap_threshold"] = sums["threshold"] / sums["thresholds"]
        return found

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
        # through from_pretrained, which knows tied weights, shards of files and renamed parameters
        saved = type(draft).from_pretrained(resume_from_checkpoint, dtype=draft.dtype)
        draft.load_state_dict(saved.state_dict())


def neutral_generation_config(draft: PreTrainedModel) -> GenerationConfig:
    """Returns a generation config with the draft's special tokens and nothing else.

    A leftover repetition_penalty or temperature would distort what the draft proposes in speculative decoding.
    """
    old = draft.generation_config or GenerationConfig()
    return GenerationConfig(bos_token_id=old.bos_token_id, eos_token_id=old.eos_token_id, pad_token_id=old.pad_token_id)
