"""Training arguments of transformers that DraftTrainer refuses, and why."""

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

_OWN_LOSS = "the loss here is the distance to a stored distribution"
_OWN_ORDER = "the order here is that of the store's shards, and goes on exactly"
_WHOLE = "the loss and the figures of an evaluation run outside of what it shards; drafts fit on one GPU"

UNSUPPORTED: dict[str, tuple[object, str]] = {
    "label_smoothing_factor": (0.0, _OWN_LOSS),
    "use_liger_kernel": (False, "the head is fused with the loss already"),
    "neftune_noise_alpha": (None, "the target saw no noise"),
    "train_sampling_strategy": ("random", _OWN_ORDER),
    "dataloader_in_order": (True, _OWN_ORDER),
    "ignore_data_skip": (False, _OWN_ORDER),
    "bf16_full_eval": (False, "evaluations compute as the training does"),
    "fp16_full_eval": (False, "evaluations compute as the training does"),
    "save_only_model": (False, "no run could go on from such a checkpoint"),
    "fp16": (False, "the head's gradient is made before the loss is scaled, and would overflow; give bf16"),
    "auto_find_batch_size": (False, "after the memory ran out the steps before it would be trained on again"),
    "enable_jit_checkpoint": (False, "it would save in the middle of a step; give save_steps"),
    "prediction_loss_only": (False, "an evaluation gathers no predictions"),
    "do_predict": (False, "there is nothing to predict"),
    "label_names": (None, "batches are of the store, and have no other names"),
    "eval_accumulation_steps": (None, "an evaluation gathers no predictions"),
    "fsdp": (None, _WHOLE),
    "deepspeed": (None, _WHOLE),
}
"""Arguments that would go unheeded or fail late, the value that they must have, and the reason."""

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
"""The least that an argument may be, and below what it must be; where transformers says nothing, or only later."""

AWAITING: dict[str, tuple[tuple[object, ...], str]] = {
    "early_stopping": ((), "stop early"),
    "load_best_model_at_end": ((), "load the best"),
    "save_strategy": (("best",), "save the best"),
    "lr_scheduler_type": (("reduce_lr_on_plateau", "greedy"), "follow a metric"),
}
"""Arguments that wait for evaluations: the values with which they do, any true one where none are named; and why."""

OF_LAYERS = ("galore", "apollo")
"""Optimizers that are made for the layers of a model, once it is there."""

LAUNCHED = {"ACCELERATE_USE_FSDP": "fsdp", "ACCELERATE_USE_DEEPSPEED": "deepspeed"}
"""How `accelerate launch` asks for some of them."""


def check_supported(values: Mapping[str, object]) -> None:
    """Raises ValueError if an argument, by its name, or the environment asks for what is not done here."""
    for name, (value, reason) in UNSUPPORTED.items():
        if values.get(name, value) != value:  # not every release of transformers has each of them
            raise ValueError(f"{name} must be {value}, got {name}={values[name]}; leave it out: {reason}")
    optimizer = str(getattr(values["optim"], "value", values["optim"]))
    if optimizer.startswith("schedule_free"):
        raise ValueError(
            f"optim must be one that trains the weights that are evaluated and saved, got optim={optimizer}; give "
            "adamw_torch_fused"
        )
    if optimizer in ("lomo", "adalomo") or optimizer.endswith("_layerwise"):
        raise ValueError(
            f"optim must be one that waits for the whole gradient, got optim={optimizer}; what a step is divided by is "
            "known at its end: give adamw_torch_fused"
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
            "ACCELERATE_MIXED_PRECISION must be bf16 or no, got fp16; launch with another --mixed_precision"
        )
    for name, meant in LAUNCHED.items():
        if parse_flag_from_env(name):
            raise ValueError(f"{name} must be false, got {name}=true; launch without {meant}: {_WHOLE}")


def check_awaited(values: Mapping[str, object]) -> None:
    """Raises ValueError if an argument, by its name, waits for evaluations and there are none; early_stopping too."""
    words = {name: getattr(value, "value", value) for name, value in values.items()}
    for name, (waiting, purpose) in AWAITING.items():
        if words["eval_strategy"] == "no" and (words[name] in waiting if waiting else words[name]):
            raise ValueError(
                f"eval_strategy must be steps or epoch to {purpose}, got eval_strategy=no with {name}={words[name]}; "
                "add --eval_strategy steps --eval_steps N"
            )


def check_training_arguments(args: TrainingArguments) -> None:
    """Raises ValueError if the arguments ask for something that DraftTrainer does not do."""
    check_supported(vars(args))
    metric = args.metric_for_best_model
    if metric is not None and args.greater_is_better != (wanted := greater_is_better(metric)):
        raise ValueError(
            f"greater_is_better must be {wanted} with metric_for_best_model={metric}, got greater_is_better="
            f"{args.greater_is_better}; change it"
        )
    for name in ("split_batches", "dispatch_batches"):
        if getattr(args.accelerator_config, name):
            raise ValueError(
                f"accelerator_config must leave {name} alone, got {name}=True; each rank reads its own batches here"
            )
    if args.n_gpu > 1:
        raise ValueError(
            f"processes must be one for each GPU, got one for {args.n_gpu}; start the job with "
            f"torchrun --nproc_per_node {args.n_gpu}, or choose a GPU with CUDA_VISIBLE_DEVICES"
        )


def check_optimizer(args: TrainingArguments) -> None:
    """Raises ValueError if the optimizer or the schedule cannot be made here: Trainer would find out late."""
    name = str(getattr(args.optim, "value", args.optim))
    if name.startswith(OF_LAYERS):
        return
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer = kind([nn.Parameter(torch.zeros(1))], **options)
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"optim must be one that can be made here, got optim={name} with optim_args={args.optim_args} "
            f"({_one_line(error)}); pip install it, or leave it out"
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
            f"lr_scheduler_kwargs must be what the schedule takes, got lr_scheduler_type={schedule} with "
            f"lr_scheduler_kwargs={args.lr_scheduler_kwargs} ({_one_line(error)}); change one of them"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
