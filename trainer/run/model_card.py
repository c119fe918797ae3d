"""Model card of a draft: how it was distilled, its figures, and commands that serve it."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard, ModelCardData

from logitstore.format.schemes import describe
from logitstore.storage.options import without_credentials
from trainer.run.run_folder import RUN, SETTINGS, figures

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import TrainerState, TrainingArguments

    from logitstore.format.spec import StoreSpec
    from trainer.run.options import RunArguments

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
"""Pattern of a model's id on the Hugging Face hub."""
PACKAGES = ("logitstore", "torch", "transformers")
"""Packages whose versions the card states."""
TAGS = ["speculative-decoding", "draft-model", "distillation", "logitstore"]
"""Tags of the card on the hub."""
TEMPLATE = Path(__file__).with_suffix(".md")
"""Text of the card, as a Jinja template."""
WORDS = {
    "steps": "optimizer steps",
    "train_runtime": "seconds of training since the run was last started or resumed",
    "loss": "mean loss of a step",
    "rows_per_second": "rows per second in that time, kept or not",
    "alpha": "sampling acceptance of a drafted token in the last logged steps, estimate (1)",
    "kl": "KL(target‖draft) in the last logged steps, nats per row (1)",
    "label_nll": "negative logprob of the text itself in the last logged steps, nats per row (1)",
    "eval_alpha_lower": "sampling acceptance of a drafted token on held-out text, lower bound",
    "eval_alpha_upper": "sampling acceptance of a drafted token on held-out text, upper bound",
    "eval_alpha_estimate": "sampling acceptance of a drafted token on held-out text, estimate",
    "eval_argmax_agreement": "greedy acceptance on held-out text: the likeliest tokens agree",
    "eval_argmax_known": "share of held-out rows whose likeliest token is certainly stored",
    "eval_forward_kl": "KL(target‖draft) on held-out text, nats per row",
    "eval_label_nll": "negative logprob of held-out text itself, nats per row",
    "eval_documents": "held-out documents of the evaluation",
    "eval_rows": "rows with loss mask 1 in these documents",
}
"""Descriptions of the figures in the card, by name. A figure that is not listed here is shown under its own name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """Facts about a draft's training, as the card shows them."""

    draft: str
    """Origin of the draft: a Hugging Face id, a folder, or a few words if the draft was created with random weights."""
    objective: str
    """Loss of a row with its settings, such as "jsd, beta 0.5"."""
    selection: str
    """Rule that selects the rows, with its settings, such as "adaspec, keep 0.4"."""
    figures: Mapping[str, float]
    """Figures by name, in the order in which they are shown."""
    settings: Mapping[str, object] = field(default_factory=dict)
    """Training arguments by name."""
    weights: str | None = None
    """Step of the draft's weights in words, such as "of step 200 of 300"; None for the last step."""
    vocab_sizes: tuple[int, int] | None = None
    """Numbers of embedding rows of the draft and of the target; None if they are equal."""
    command: str | None = None
    """Command that repeats the training."""
    gamma: int = 5
    """Number of tokens drafted per target call, in the serving commands of the card."""


def model_card(name: str, stores: Mapping[str, StoreSpec], training: Training) -> str:
    """Returns the text of a draft's README.md.

    Args:
        name: Folder or Hugging Face id of the draft, as the serving commands name it.
        stores: Specifications of the stores that the draft was trained on, by URL. The card omits credentials in URLs.
        training: Facts about the training.

    Returns:
        Markdown with a YAML header in the form that the Hugging Face hub reads.
    """
    spec = next(iter(stores.values()))
    target = "TARGET" if spec.target is None else without_credentials(spec.target.model.name)
    # The hub refuses a base_model that is not an id.
    is_id = HUB_ID.fullmatch(training.draft) and not Path(training.draft).exists()
    card = ModelCard.from_template(
        ModelCardData(
            base_model=training.draft if is_id else None,
            library_name="transformers",
            pipeline_tag="text-generation",
            tags=TAGS,
            target_model=target,
        ),
        template_path=str(TEMPLATE),
        target=target,
        draft=name,
        origin=[(what, _cell(said)) for what, said in _origin(stores, target, training) if said],
        command=training.command,
        figures=[(_cell(WORDS.get(name, name)), _number(value)) for name, value in training.figures.items()],
        vocab_sizes=training.vocab_sizes,
        gamma=training.gamma,
        speculative_config=json.dumps(
            {"method": "draft_model", "model": name, "num_speculative_tokens": training.gamma}
        ),
        versions=", ".join(filter(None, map(_version, PACKAGES))),
        shell=shlex.quote,
        python=repr,
    )
    return str(card)


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:  # The program may run from a source checkout without being installed.
        return ""


def _origin(stores: Mapping[str, StoreSpec], target: str, training: Training) -> list[tuple[str, str]]:
    spec = next(iter(stores.values()))
    model = "" if spec.target is None else f", revision {spec.target.model.revision}, {spec.target.model.dtype}"
    rows = [
        ("began as", without_credentials(training.draft)),
        ("target", target + model),
        ("target's distributions", describe(spec.target.scheme) if spec.target else "none"),
    ]
    for name, each in stores.items():
        rows += [
            ("store", without_credentials(name)),
            (
                "its data",
                f"{without_credentials(each.data.source)} ({each.data.columns}; loss on {each.data.mask_policy}; "
                f"documents of at most {each.max_length} tokens)",
            ),
        ]
    rows += [
        ("tokenizer", f"{without_credentials(spec.tokenizer.name)}, {spec.tokenizer.vocab_size} tokens"),
        ("objective", training.objective),
        ("selection of rows", training.selection),
        ("settings", ", ".join(f"{name} {value}" for name, value in training.settings.items())),
        ("weights", training.weights or ""),
    ]
    return rows


def _number(value: float) -> str:
    return f"{int(value):,}" if float(value).is_integer() else f"{value:.4g}"


def _cell(text: str) -> str:
    # A bar or a line break would end the cell of the table.
    return text.replace("|", "\\|").replace("\n", " ")


CARD = "README.md"
"""Name of the card's file."""
LOGGED = ("kl", "alpha", "label_nll")
"""Names of the training statistics whose last logged values the card shows."""


def write_card(
    run: RunArguments,
    training: TrainingArguments,
    specs: Sequence[StoreSpec],
    state: TrainerState,
    where: str,
    num_embeddings: int,
) -> None:
    """Writes the model card into the output folder.

    Args:
        run: Options of this project.
        training: Training arguments of transformers.
        specs: Specifications of the stores, in the order of `run.store.store`.
        state: State at the end of the training.
        where: Folder or URL of the draft.
        num_embeddings: Number of embedding rows of the draft.
    """
    folder = Path(str(training.output_dir))
    ended = figures(state)
    last = {name: entry[name] for entry in state.log_history for name in LOGGED if name in entry}
    weights = None
    if training.load_best_model_at_end and state.best_global_step is not None:
        weights = f"of step {state.best_global_step} of {state.global_step}, best by {training.metric_for_best_model}"
        if state.best_global_step != state.global_step:
            last = {}  # These statistics belong to the weights of the last step, not to the best weights.
    # The card shows the figures in this order: the run, the last logged steps, the evaluation.
    numbers = {name: ended.pop(name) for name in ("steps", "loss", "train_runtime", "rows_per_second")} | last | ended
    began = run.draft.draft or "random weights"
    if run.draft.draft_config:
        began = f"random weights, {' '.join(run.draft.draft_config)}"
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
        command=f"logitstore train {RUN} --output_dir OTHER",
    )
    counts = [""] * len(specs)
    if run.store.store_weights is not None:
        counts = [f", {weight:g} times an epoch" for weight in run.store.store_weights]
    stores = {url + count: spec for url, count, spec in zip(run.store.store, counts, specs, strict=True)}
    text = model_card(training.hub_model_id or where, stores, made)
    (folder / CARD).write_text(text, encoding="utf-8")


def _settings(run: RunArguments, training: TrainingArguments) -> dict[str, object]:
    found = {name: getattr(training, name) for name in SETTINGS}
    # max_steps takes precedence over num_train_epochs, so only one of these two arguments had an effect.
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
