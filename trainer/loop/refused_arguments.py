"""Training arguments of transformers that DraftTrainer refuses, with the reasons."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

import torch
from accelerate.utils import parse_flag_from_env
from torch import nn
from transformers import Trainer, get_scheduler

from trainer.evaluation.held_out import greater_is_better

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import TrainingArguments

_OWN_LOSS = "the loss is a distance to a stored distribution"
_OWN_ORDER = "documents are read shard by shard, and a resumed run continues that order exactly"
_WHOLE = "the loss and the evaluation run outside the module that would be sharded; a draft fits on one GPU"

UNSUPPORTED: dict[str, tuple[object, str]] = {
    "label_smoothing_factor": (0.0, _OWN_LOSS),
    "use_liger_kernel": (False, "the head is already fused with the loss"),
    "neftune_noise_alpha": (None, "the target's distributions were computed without noise"),
    "train_sampling_strategy": ("random", _OWN_ORDER),
    "dataloader_in_order": (True, _OWN_ORDER),
    "ignore_data_skip": (False, _OWN_ORDER),
    "bf16_full_eval": (False, "evaluations use the precision of the training"),
    "fp16_full_eval": (False, "evaluations use the precision of the training"),
    "save_only_model": (False, "a run cannot be resumed from such a checkpoint"),
    "fp16": (False, "bf16 is supported; with fp16, the gradient of the head would overflow"),
    "auto_find_batch_size": (False, "after an out-of-memory error it would repeat the steps already trained on"),
    "enable_jit_checkpoint": (False, "it would save in the middle of a step; use save_steps instead"),
    "prediction_loss_only": (False, "evaluations never gather predictions"),
    "do_predict": (False, "this trainer makes no predictions"),
    "label_names": (None, "batches come from the store and have fixed names"),
    "eval_accumulation_steps": (None, "evaluations never gather predictions"),
    "fsdp": (None, _WHOLE),
    "deepspeed": (None, _WHOLE),
}
"""Training arguments that support one value only. Any other value would be ignored, or would fail late in a run. Each
argument's name maps to the allowed value, and to the reason why other values are refused."""

RANGES: dict[str, tuple[float, float]] = {
    "per_device_train_batch_size": (1, math.inf),
    "per_device_eval_batch_size": (1, math.inf),
    "gradient_accumulation_steps": (1, math.inf),
    "dataloader_num_workers": (0, math.inf),
    "learning_rate": (0, math.inf),
    "weight_decay": (0, math.inf),
    "adam_beta1": (0, 1),
    "adam_beta2": (0, 1),
    "adam_epsilon": (0, math.inf),
    "max_grad_norm": (0, math.inf),
    "warmup_steps": (0, math.inf),
    "logging_steps": (0, math.inf),
    "save_steps": (0, math.inf),
    "seed": (0, 2**32),
    "data_seed": (0, 2**32),
}
"""Ranges of training arguments that transformers checks late or never. Each argument's name maps to the smallest
allowed value and to the exclusive upper limit."""

AWAITING: dict[str, tuple[tuple[object, ...], str]] = {
    "early_stopping": ((), "stop early"),
    "load_best_model_at_end": ((), "load the best checkpoint"),
    "save_strategy": (("best",), "save the best checkpoint"),
    "lr_scheduler_type": (("reduce_lr_on_plateau", "greedy"), "follow a metric"),
}
"""Arguments that only work in a run with evaluations. Each argument's name maps to the values that need evaluations
(an empty tuple stands for every true value), and to the purpose of the evaluations, for the error message."""

OF_LAYERS = ("galore", "apollo")
"""Prefixes of the names of optimizers that are created for a model's layers. `check_optimizer` has no model, so it
skips these optimizers."""

LAUNCHED = {"ACCELERATE_USE_FSDP": "fsdp", "ACCELERATE_USE_DEEPSPEED": "deepspeed"}
"""Environment variables by which `accelerate launch` requests a method that DraftTrainer refuses. Each variable's name
maps to the name of the method."""


def check_supported(values: Mapping[str, object]) -> None:
    """Raises ValueError if the arguments or the environment request something that DraftTrainer does not support.

    Args:
        values: Values of the training arguments by name.
    """
    for name, (value, reason) in UNSUPPORTED.items():
        if values.get(name, value) != value:  # Some releases of transformers lack some of these arguments.
            raise ValueError(f"{name} must be {value}, got {name}={values[name]} ({reason}); omit it")
    # Schedule-free optimizers train weights that differ from the weights that are evaluated. LOMO and layerwise
    # optimizers update the weights during the backward pass, before the denominator of the step is known.
    optimizer = str(getattr(values["optim"], "value", values["optim"]))
    if optimizer.startswith("schedule_free"):
        raise ValueError(
            f"optim must train the same weights that are evaluated and saved, got optim={optimizer}; give "
            "adamw_torch_fused"
        )
    if optimizer in ("lomo", "adalomo") or optimizer.endswith("_layerwise"):
        raise ValueError(
            f"optim must be one that updates the weights after the whole backward pass, got optim={optimizer} (before, "
            "the denominator of the step is not known); give adamw_torch_fused"
        )
    for name, (least, below) in RANGES.items():
        if values[name] is not None and not least <= values[name] < below:  # type: ignore[operator]
            limit = f" and below {below}" if math.isfinite(below) else ""
            raise ValueError(f"{name} must be at least {least}{limit}, got {name}={values[name]}; change --{name}")
    if values["max_steps"] <= 0 and not values["num_train_epochs"] > 0:  # type: ignore[operator]
        raise ValueError(
            f"num_train_epochs must be above 0, got num_train_epochs={values['num_train_epochs']}; change it, or add "
            "--max_steps"
        )
    if os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp16":
        raise ValueError(
            "ACCELERATE_MIXED_PRECISION must be 'bf16' or 'no', got 'fp16'; launch with --mixed_precision bf16 or no"
        )
    for name, meant in LAUNCHED.items():
        if parse_flag_from_env(name):
            raise ValueError(f"{name} must be false, got {name}=true ({_WHOLE}); launch without {meant}")


def check_awaited(values: Mapping[str, object]) -> None:
    """Raises ValueError if an argument needs evaluations but none are requested.

    Args:
        values: Values of the training arguments and of the option `early_stopping`, by name.
    """
    words = {name: getattr(value, "value", value) for name, value in values.items()}
    for name, (waiting, purpose) in AWAITING.items():
        if words["eval_strategy"] == "no" and (words[name] in waiting if waiting else words[name]):
            raise ValueError(
                f"eval_strategy must be steps or epoch to {purpose}, got eval_strategy=no with {name}={words[name]}; "
                "add --eval_strategy steps --eval_steps N"
            )


def check_training_arguments(args: TrainingArguments) -> None:
    """Raises ValueError if the arguments request something that DraftTrainer does not support."""
    check_supported(vars(args))
    metric = args.metric_for_best_model
    if metric is not None and args.greater_is_better != (wanted := greater_is_better(metric)):
        raise ValueError(
            f"greater_is_better must be {wanted} with metric_for_best_model={metric}, got greater_is_better="
            f"{args.greater_is_better}; omit it"
        )
    for name in ("split_batches", "dispatch_batches"):
        if getattr(args.accelerator_config, name):
            raise ValueError(
                f"accelerator_config must not set {name}, got {name}=True; each rank already reads its own batches"
            )
    if args.n_gpu > 1:
        raise ValueError(
            f"the number of processes must equal the number of GPUs, got one for {args.n_gpu} GPUs; start the job "
            f"with torchrun --nproc_per_node {args.n_gpu}, or choose a GPU with CUDA_VISIBLE_DEVICES"
        )


def check_optimizer(args: TrainingArguments) -> None:
    """Raises ValueError if the optimizer or the schedule cannot be created. Trainer would raise the error much later.

    The check creates an optimizer and a schedule for a single parameter, and discards both.
    """
    name = str(getattr(args.optim, "value", args.optim))
    if name.startswith(OF_LAYERS):
        return
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer = kind([nn.Parameter(torch.zeros(1))], **options)
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"optim must be one that this installation can create, got optim={name} with optim_args={args.optim_args} "
            f"({_one_line(error)}); install its package, or omit it"
        ) from error
    schedule = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    try:
        get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=0,
            num_training_steps=1,
            scheduler_specific_kwargs=dict(args.lr_scheduler_kwargs or {}),  # type: ignore[arg-type]
        )
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"lr_scheduler_kwargs must fit the schedule, got lr_scheduler_type={schedule} with "
            f"lr_scheduler_kwargs={args.lr_scheduler_kwargs} ({_one_line(error)}); change one of them"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
