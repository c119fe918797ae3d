"""The model card of a run of train_draft.py: README.md beside the model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from _runs import RUN, SETTINGS, figures

from logitstore.storage.options import without_credentials
from trainer.run.model_card import Training, model_card

if TYPE_CHECKING:
    from collections.abc import Sequence

    from _train_arguments import RunArguments
    from transformers import TrainerState, TrainingArguments

    from logitstore.format.spec import StoreSpec

CARD = "README.md"
LOGGED = ("kl", "alpha", "label_nll")
"""What is logged of the last steps and shown."""


def write_card(
    run: RunArguments,
    training: TrainingArguments,
    specs: Sequence[StoreSpec],
    state: TrainerState,
    where: str,
    num_embeddings: int,
) -> None:
    """Writes the card into the output directory, with the numbers of the run.

    Args:
        run: What was trained.
        training: How.
        specs: Of the stores.
        state: Of the end.
        where: The draft's folder or URL.
        num_embeddings: Rows of the draft's embeddings.
    """
    folder = Path(str(training.output_dir))
    ended = figures(state)
    last = {name: entry[name] for entry in state.log_history for name in LOGGED if name in entry}
    weights = None
    if training.load_best_model_at_end and state.best_global_step is not None:
        weights = f"of step {state.best_global_step} of {state.global_step}, best by {training.metric_for_best_model}"
        if state.best_global_step != state.global_step:
            last = {}  # of other weights
    numbers = {name: ended.pop(name) for name in ("steps", "loss", "train_runtime", "rows_per_second")} | last | ended
    began = run.draft.draft or "made anew"
    if run.draft.draft_config:
        began = f"made anew, {' '.join(run.draft.draft_config)}"
    elif run.draft.draft_layers is not None:
        began += f", layers {run.draft.draft_layers}"
    target = specs[0].target
    sizes = (num_embeddings, num_embeddings if target is None else target.model.padded_vocab_size)
    made = Training(
        draft=began,
        objective=_objective(run),
        selection=_selection(run, specs[0]),
        figures=numbers,
        settings=_settings(run, training),
        weights=weights,
        vocab_sizes=None if sizes[0] == sizes[1] else sizes,
        command=f"python jobs/train_draft.py {RUN} --output_dir OTHER",
    )
    counts = [""] * len(specs)
    if run.store.store_weights is not None:
        counts = [f", {weight:g} times an epoch" for weight in run.store.store_weights]
    stores = {url + count: spec for url, count, spec in zip(run.store.store, counts, specs, strict=True)}
    text = model_card(training.hub_model_id or where, stores, made)
    (folder / CARD).write_text(text, encoding="utf-8")


def _settings(run: RunArguments, training: TrainingArguments) -> dict[str, object]:
    found = {name: getattr(training, name) for name in SETTINGS}
    del found["num_train_epochs" if training.max_steps > 0 else "max_steps"]
    found |= {"ranks": training.world_size, "packing": run.batches.packing}
    if run.store.eval_fraction:
        found["eval_fraction"] = run.store.eval_fraction
    return {name: getattr(value, "value", value) for name, value in found.items()}


def _objective(run: RunArguments) -> str:
    loss = run.loss
    parts = [loss.objective]
    if loss.objective == "jsd":
        parts.append(f"beta {loss.beta:g}")
    if loss.label_weight:
        parts.append(f"label_weight {loss.label_weight:g}")
    if run.draft.lora_rank is not None:
        parts.append(f"LoRA of rank {run.draft.lora_rank}, merged")
    return ", ".join(parts)


def _selection(run: RunArguments, spec: StoreSpec) -> str:
    loss, selection = run.loss, run.rule().selection
    parts = [loss.selection]
    if selection.competes:
        parts += [f"keep {loss.keep:g}", f"scope {run.rule().scope}"]
    if selection.selects:
        parts.append(f"denominator {loss.denominator}")
    if loss.outside_weight:
        parts.append(f"outside_weight {loss.outside_weight:g}")
    for column, name in run.losses().items():
        model = spec.losses[name].model
        parts.append(f"{column} {name} of {without_credentials(model.name)}, revision {model.revision}")
    return ", ".join(parts)
