"""The options of train_draft.py that are its own, in groups, and their help on one screen."""

from __future__ import annotations

import dataclasses
import textwrap
from dataclasses import dataclass, field
from typing import ClassVar

from logitstore.store.reader import CACHE_BYTES
from trainer.data.order import MAX_WINDOW
from trainer.drafts.lora import ALL_LINEAR
from trainer.loop.step_accounting import QUEUE_ROWS
from trainer.loss.objectives import OBJECTIVES
from trainer.loss.selection import SCOPES, SELECTIONS

HELP_WIDTH = 118
COLUMN = 29
"""Where the lines of help begin."""


def said(metavar: str, text: str) -> dict[str, str]:
    """Returns the metadata of an option: what stands for its value, and a line of help with its unit."""
    return {"metavar": metavar, "help": text}


@dataclass(frozen=True, kw_only=True)
class StoreArguments:
    """What is read."""

    _argument_group_name: ClassVar[str] = "store"

    store: list[str] = field(
        default_factory=list, metadata=said("URL", "one store or several of one tokenizer (required)")
    )
    store_weights: list[float] | None = field(
        default=None, metadata=said("X", "passes over each store in an epoch [1 each]")
    )
    eval_fraction: float = field(
        default=0.0, metadata=said("X", "fraction of the documents held out, by what is in them")
    )
    eval_documents: int = field(default=512, metadata=said("N", "most documents of these that an evaluation reads"))
    k: int | None = field(
        default=None, metadata=said("N", "read as if dumped by --scheme topk with so many entries a row")
    )
    mass: float | None = field(
        default=None, metadata=said("P", "read as if dumped by --scheme nucleus with this probability")
    )
    storage_options: str | None = field(
        default=None, metadata=said("FILE", "JSON with fsspec options for the stores' and output's URLs")
    )
    cache_dir: str | None = field(
        default=None, metadata=said("DIR", "keeps what is read from a bucket; processes may share it")
    )
    cache_bytes: int = field(default=CACHE_BYTES, metadata=said("BYTES", "the most that --cache_dir grows to"))


@dataclass(frozen=True, kw_only=True)
class DraftArguments:
    """Where the draft comes from."""

    _argument_group_name: ClassVar[str] = "draft"

    draft: str | None = field(
        default=None, metadata=said("MODEL", "Hugging Face id or folder of the draft to begin with")
    )
    draft_config: list[str] = field(
        default_factory=list,
        metadata=said(
            "C", "random weights instead: a config.json, folder or id, then key=value such as hidden_size=256"
        ),
    )
    draft_layers: str | None = field(
        default=None, metadata=said("L", "cut from --draft: so many layers evenly spaced, or these: 0,9,27")
    )
    pad_vocab_size: str | None = field(
        default=None, metadata=said("N", "rows of the embeddings, a number or target: vLLM wants them equal")
    )
    lora_rank: int | None = field(default=None, metadata=said("N", "train a LoRA of this rank, merged in the end"))
    lora_alpha: float = field(default=32.0, metadata=said("X", "its updates are scaled by alpha / rank"))
    lora_dropout: float = field(default=0.0, metadata=said("P", "of its inputs"))
    lora_targets: list[str] = field(
        default_factory=lambda: [ALL_LINEAR], metadata=said("NAME", "linear layers that it adapts")
    )
    revision: str | None = field(default=None, metadata=said("REV", "branch, tag or commit of the draft on the hub"))
    dtype: str = field(default="float32", metadata=said("TYPE", "of the weights, auto is the draft's; see --bf16 too"))
    attn_implementation: str | None = field(
        default=None, metadata=said("NAME", "sdpa, flash_attention_2, eager, ... [transformers' choice]")
    )
    trust_remote_code: bool = field(default=False, metadata=said("BOOL", "run code that comes with the draft"))


@dataclass(frozen=True, kw_only=True)
class LossArguments:
    """What is minimised, and at which rows."""

    _argument_group_name: ClassVar[str] = "loss"

    objective: str = field(default="forward_kl", metadata=said("NAME", f"{' | '.join(OBJECTIVES)}"))
    beta: float = field(default=0.5, metadata=said("X", "of jsd, between 0 and 1"))
    label_weight: float = field(
        default=0.0, metadata=said("X", "share of the text's own cross entropy in the loss, 0 to 1")
    )
    selection: str = field(default="all", metadata=said("NAME", f"which rows count: {' | '.join(SELECTIONS)}"))
    keep: float = field(default=0.4, metadata=said("X", "fraction of the rows that a selection keeps"))
    scope: str | None = field(
        default=None, metadata=said("NAME", f"of which rows: {' | '.join(SCOPES)} [the selection's own]")
    )
    queue_rows: int = field(default=QUEUE_ROWS, metadata=said("N", "recent rows that scope queue compares with"))
    outside_weight: float = field(default=0.0, metadata=said("X", "weight of rows that are not kept, 0 to 1"))
    reference: str | None = field(
        default=None, metadata=said("NAME", "the stores' losses that adaspec and static_gap compare with")
    )
    initial: str | None = field(
        default=None, metadata=said("NAME", "the stores' losses of the draft as it is now, for static_gap")
    )
    denominator: str = field(
        default="kept", metadata=said("NAME", "divides the sum: kept (AdaSPEC's paper) | masked (its code)")
    )


@dataclass(frozen=True, kw_only=True)
class BatchArguments:
    """How documents become batches, and who runs them."""

    _argument_group_name: ClassVar[str] = "batches"

    packing: bool = field(
        default=False, metadata=said("BOOL", "documents share rows of a batch, and see nothing of each other")
    )
    pack_length: int | None = field(
        default=None, metadata=said("N", "most tokens of such a row [the stores' max_length]")
    )
    shuffle_window: int = field(
        default=MAX_WINDOW, metadata=said("N", "shards among which documents are shuffled, 1 to 4")
    )
    num_workers: int | None = field(
        default=None, metadata=said("N", "train on so many Ray workers, one GPU each if there are any")
    )
    early_stopping: int | None = field(
        default=None, metadata=said("N", "stop after so many evaluations that are no better than the best")
    )
    dry_run: bool = field(
        default=False, metadata=said("BOOL", "everything but the steps: checks, sizes, an estimate of memory")
    )


GROUPS = (StoreArguments, DraftArguments, LossArguments, BatchArguments)
OURS = tuple(f.name for group in GROUPS for f in dataclasses.fields(group))


def help_text(description: str) -> str:
    """Returns the help of the job's own options, for one screen; defaults in brackets."""
    lines = [description.strip()]
    for group in GROUPS:
        lines.append(f"\n{group._argument_group_name}: {str(group.__doc__).rstrip('.').lower()}")
        for each in dataclasses.fields(group):
            usual = each.default if each.default_factory is dataclasses.MISSING else " ".join(each.default_factory())
            text = each.metadata["help"] + (f" [{str(usual).lower()}]" if usual not in (None, "") else "")
            many = " ..." if "list" in str(each.type) else ""
            flag = f"  --{each.name} {each.metadata['metavar']}{many}"
            lines += textwrap.wrap(text, HELP_WIDTH, initial_indent=f"{flag:<{COLUMN}}", subsequent_indent=" " * COLUMN)
    return "\n".join(lines)
