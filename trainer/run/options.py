"""This project's own options of `logitstore train`, in groups. Each option has a one-line help text."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar

from logitstore.errors import nearest
from logitstore.store.reader import CACHE_BYTES
from trainer.data.order import MAX_WINDOW, check_eval_fraction, check_window
from trainer.drafts.lora import ALL_LINEAR, Lora
from trainer.drafts.source import DraftSource
from trainer.loop.step_accounting import DENOMINATORS, QUEUE_ROWS, Denominator
from trainer.loss.objectives import OBJECTIVES, Objective, make_objective
from trainer.loss.selection import SCOPES, SELECTIONS, Rule, make_rule


def said(metavar: str, text: str) -> dict[str, str]:
    """Returns the metadata of an option's dataclass field.

    Args:
        metavar: Placeholder of the value in the help.
        text: Help text, with the unit of the value.
    """
    return {"metavar": metavar, "help": text}


@dataclass(frozen=True, kw_only=True)
class StoreArguments:
    """Stores and documents to read."""

    _argument_group_name: ClassVar[str] = "store"

    store: list[str] = field(
        default_factory=list, metadata=said("URL", "one store, or several that share a tokenizer (required)")
    )
    store_weights: list[float] | None = field(
        default=None, metadata=said("X", "number of passes over each store in one epoch, such as 1 0.5 [1 each]")
    )
    eval_fraction: float = field(
        default=0.0, metadata=said("X", "fraction of the documents held out for evaluation, chosen by their content")
    )
    eval_documents: int = field(default=512, metadata=said("N", "maximum number of documents in one evaluation"))
    k: int | None = field(
        default=None,
        metadata=said("N", "maximum number of entries read per row, as if dumped with this smaller --k"),
    )
    mass: float | None = field(
        default=None,
        metadata=said("P", "read only entries up to this total probability of a row, as with --scheme nucleus"),
    )
    storage_options: str | None = field(
        default=None, metadata=said("FILE", "JSON file with fsspec options for the URLs of the stores and the output")
    )
    cache_dir: str | None = field(
        default=None, metadata=said("DIR", "folder that keeps data read from a bucket; several processes may share it")
    )
    cache_bytes: int = field(default=CACHE_BYTES, metadata=said("BYTES", "maximum size of --cache_dir in bytes"))


@dataclass(frozen=True, kw_only=True)
class DraftArguments:
    """Model to train."""

    _argument_group_name: ClassVar[str] = "draft"

    draft: str | None = field(
        default=None, metadata=said("MODEL", "Hugging Face id or folder of the draft to start from")
    )
    draft_config: list[str] = field(
        default_factory=list,
        metadata=said("C", "random weights: config file, folder or id, then changes such as hidden_size=256"),
    )
    draft_layers: str | None = field(
        default=None,
        metadata=said("L", "layers of --draft to keep: a number, evenly spaced (4), or their indices (0,9,27)"),
    )
    pad_vocab_size: str | None = field(
        default=None,
        metadata=said("N", "number of embedding rows, or the word target: as many as the target has (for vLLM)"),
    )
    lora_rank: int | None = field(
        default=None, metadata=said("N", "train a LoRA of this rank; it is merged into the draft at the end")
    )
    lora_alpha: float = field(default=32.0, metadata=said("X", "the updates of the LoRA are scaled by alpha / rank"))
    lora_dropout: float = field(
        default=0.0, metadata=said("P", "fraction of the LoRA's inputs that is dropped in training")
    )
    lora_targets: list[str] = field(
        default_factory=lambda: [ALL_LINEAR],
        metadata=said("NAME", "linear layers that get a LoRA, given by the ends of their names"),
    )
    draft_revision: str | None = field(
        default=None, metadata=said("REV", "branch, tag or commit of the draft on the hub")
    )
    dtype: str = field(
        default="float32",
        metadata=said("TYPE", "data type of the weights: auto (that of --draft) | float32 | bfloat16; see also --bf16"),
    )
    attn_implementation: str | None = field(
        default=None, metadata=said("NAME", "attention: sdpa, flash_attention_2, eager, ... [transformers' choice]")
    )
    trust_remote_code: bool = field(default=False, metadata=said("BOOL", "run Python code that comes with the draft"))


@dataclass(frozen=True, kw_only=True)
class LossArguments:
    """Objective, and the selection of rows."""

    _argument_group_name: ClassVar[str] = "loss"

    objective: str = field(default="forward_kl", metadata=said("NAME", f"loss of a row: {' | '.join(OBJECTIVES)}"))
    beta: float = field(default=0.5, metadata=said("X", "weight of the target in the mixture of jsd, between 0 and 1"))
    label_weight: float = field(
        default=0.0,
        metadata=said("X", "weight in the loss of the cross entropy with the document's next token, 0 to 1"),
    )
    selection: str = field(default="all", metadata=said("NAME", f"row selection: {' | '.join(SELECTIONS)}"))
    keep: float = field(default=0.4, metadata=said("X", "fraction of the rows that the selection keeps"))
    scope: str | None = field(
        default=None, metadata=said("NAME", f"rows compete within one: {' | '.join(SCOPES)} [set by --selection]")
    )
    queue_rows: int = field(
        default=QUEUE_ROWS, metadata=said("N", "number of recent rows that a row competes with in --scope queue")
    )
    outside_weight: float = field(
        default=0.0, metadata=said("X", "weight in the loss of the rows that are not kept, 0 to 1")
    )
    reference: str | None = field(
        default=None,
        metadata=said("NAME", "name of the reference's stored losses, for adaspec, bottom_gap and static_gap"),
    )
    initial: str | None = field(
        default=None, metadata=said("NAME", "name of the stored losses of the draft before training, for static_gap")
    )
    denominator: str = field(
        default="kept",
        metadata=said("NAME", "divide the loss by the rows kept (AdaSPEC's paper) or masked: all (its code)"),
    )


@dataclass(frozen=True, kw_only=True)
class BatchArguments:
    """Batches, processes and the course of the run."""

    _argument_group_name: ClassVar[str] = "batches"

    packing: bool = field(
        default=False, metadata=said("BOOL", "join documents into one sequence; they do not attend to each other")
    )
    pack_length: int | None = field(
        default=None, metadata=said("N", "maximum number of tokens of a packed sequence [the stores' max_length]")
    )
    shuffle_window: int = field(
        default=MAX_WINDOW, metadata=said("N", "number of shards whose documents are shuffled together, 1 to 4")
    )
    num_workers: int | None = field(
        default=None, metadata=said("N", "train on this many Ray workers, with one GPU each if there are GPUs")
    )
    early_stopping: int | None = field(
        default=None, metadata=said("N", "stop after this many consecutive evaluations without improvement")
    )
    dry_run: bool = field(
        default=False, metadata=said("BOOL", "check everything, print sizes and a memory estimate, and stop")
    )
    no_progress: bool = field(default=False, metadata=said("BOOL", "hide progress bars"))
    json: bool = field(default=False, metadata=said("BOOL", "print the figures of the run as JSON at the end"))


GROUPS = (StoreArguments, DraftArguments, LossArguments, BatchArguments)
OURS = tuple(f.name for group in GROUPS for f in dataclasses.fields(group))
"""Names of all options in GROUPS."""


CHOICES: dict[str, tuple[str, ...]] = {
    "denominator": DENOMINATORS,
    "dtype": ("auto", "float32", "bfloat16"),
}
"""Allowed values of some options, by the option's name. No other code checks these options."""


@dataclass(frozen=True, kw_only=True)
class RunArguments:
    """All options in GROUPS. They are checked as far as possible without reading any file."""

    store: StoreArguments
    draft: DraftArguments
    loss: LossArguments
    batches: BatchArguments

    def __post_init__(self) -> None:
        if not all(self.store.store) or not self.store.store:
            raise ValueError("store must be given, got none; add --store")
        for name, known in CHOICES.items():
            value = getattr(self.loss if name == "denominator" else self.draft, name)
            if value not in known:
                near = nearest(str(value), known)
                raise ValueError(f"{name} must be one of {list(known)}, got {name}={value}{near}; change --{name}")
        for name, least in {"eval_documents": 1, "queue_rows": 1, "num_workers": 1, "early_stopping": 1}.items():
            found = next(getattr(part, name) for part in vars(self).values() if hasattr(part, name))
            if found is not None and found < least:
                raise ValueError(f"{name} must be at least {least}, got {name}={found}; give a larger value")
        check_eval_fraction(self.store.eval_fraction)
        check_window(self.batches.shuffle_window)
        self.objective()  # Raises ValueError if the options of the objective do not fit.
        self._check_used()
        needs = self.rule().selection.needs
        for name, column in {"reference": "reference_ce", "initial": "initial_ce"}.items():
            if column in needs and getattr(self.loss, name) is None:
                raise ValueError(
                    f"selection={self.loss.selection} needs --{name}, got {name}=None; "
                    f"add --{name} NAME, the NAME given to logitstore dump --reference NAME=MODEL"
                )
        if self.loss.initial is not None and self.loss.initial == self.loss.reference:
            raise ValueError(
                f"initial must differ from reference, got initial={self.loss.initial} for both; give the losses of the "
                "draft before this training"
            )

    def _check_used(self) -> None:
        """Raises ValueError if an option has no effect because the option that it depends on is not given."""
        loss, draft, rule = self.loss, self.draft, self.rule()
        selects, competes = rule.selection.selects, rule.selection.competes
        uses = {
            "keep": (loss, competes, "a --selection that keeps a fraction, such as adaspec"),
            "scope": (loss, competes, "a --selection that keeps a fraction, such as adaspec"),
            "outside_weight": (loss, selects, "a --selection other than all"),
            "queue_rows": (loss, rule.scope == "queue", "--scope queue"),
            "reference": (loss, "reference_ce" in rule.selection.needs, "--selection adaspec"),
            "initial": (loss, "initial_ce" in rule.selection.needs, "--selection static_gap"),
            "beta": (loss, loss.objective == "jsd", "--objective jsd"),
            "label_weight": (loss, loss.objective != "label_nll", "an --objective other than label_nll"),
            "denominator": (loss, selects, "a --selection other than all"),
            "pack_length": (self.batches, self.batches.packing, "--packing true"),
            "lora_alpha": (draft, draft.lora_rank is not None, "--lora_rank"),
            "lora_dropout": (draft, draft.lora_rank is not None, "--lora_rank"),
            "lora_targets": (draft, draft.lora_rank is not None, "--lora_rank"),
            "draft_revision": (draft, draft.draft is not None, "--draft"),
            "cache_bytes": (self.store, self.store.cache_dir is not None, "--cache_dir"),
            "eval_documents": (self.store, self.store.eval_fraction > 0, "--eval_fraction"),
        }
        for name, (group, is_used, wanted) in uses.items():
            value = getattr(group, name)
            # An option given with its default value looks like an option that is not given, so it passes this check.
            if not is_used and value != getattr(type(group)(), name):
                raise ValueError(f"{name} needs {wanted}, got {name}={value} without it; add it, or omit --{name}")

    def objective(self) -> Objective:
        """Returns the objective that is minimised.

        Raises:
            ValueError: The objective is unknown, or a value is out of its range.
        """
        return make_objective(self.loss.objective, beta=self.loss.beta, label_weight=self.loss.label_weight)

    def rule(self) -> Rule:
        """Returns the rule that decides which rows are kept.

        Raises:
            ValueError: The selection or the scope is unknown, or a value is out of its range.
        """
        loss = self.loss
        return make_rule(loss.selection, keep=loss.keep, scope=loss.scope, outside_weight=loss.outside_weight)

    def denominator(self) -> Denominator:
        """Returns the name of the number that divides the loss sum of a step: "kept" or "masked"."""
        return "kept" if self.loss.denominator == "kept" else "masked"

    def losses(self) -> dict[str, str]:
        """Returns the names of the stored losses to read, keyed by the column that each one fills; may be empty."""
        given = {"reference_ce": self.loss.reference, "initial_ce": self.loss.initial}
        return {column: name for column, name in given.items() if name is not None}

    def source(self, seed: int) -> DraftSource:
        """Returns the description of the draft: the model that it is made from, and the changes to that model.

        Args:
            seed: Seed for weights that are created at random.

        Raises:
            ValueError: Options of the draft contradict each other.
        """
        asked = self.draft
        lora = None
        if asked.lora_rank is not None:
            targets = tuple(asked.lora_targets)
            lora = Lora(rank=asked.lora_rank, alpha=asked.lora_alpha, dropout=asked.lora_dropout, targets=targets)
        return DraftSource(
            draft=asked.draft,
            config=tuple(asked.draft_config),
            layers=asked.draft_layers,
            pad_vocab_size=asked.pad_vocab_size,
            lora=lora,
            revision=asked.draft_revision,
            dtype=asked.dtype,
            attn_implementation=asked.attn_implementation,
            trust_remote_code=asked.trust_remote_code,
            seed=seed,
        )
