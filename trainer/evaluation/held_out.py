"""Evaluates a draft on held-out documents while it is trained, and lists the metrics that select the best draft.

The metrics are those of `trainer.evaluation.from_cache`, computed over those rows of held-out documents
whose loss mask is 1.
"""

from __future__ import annotations

import difflib
import math
import time
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import Dataset

from logitstore.rows.batches import batches, plan_batches
from trainer.data.order import Pack
from trainer.evaluation.from_cache import COMPARED, StoredDocuments, batch_sums, evaluating, read_documents

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from accelerate import Accelerator

    from logitstore.models.split_lm import SplitLM
    from trainer.data.dataset import DocumentDataset

GREATER_IS_BETTER = {
    "alpha_estimate": True,
    "alpha_lower": True,
    "alpha_upper": True,
    "argmax_agreement": True,
    "forward_kl": False,
    "label_nll": False,
}
"""Metrics that can select the best draft, keyed by name. The value is true if a greater metric is better."""

KEPT_BYTES = 2**28
"""Maximum total size, in bytes, of the decoded documents that each process keeps in memory between evaluations.

256 MiB hold about a million rows of 10 entries."""


def greater_is_better(metric: str) -> bool:
    """Returns whether a greater value of a metric means a better draft.

    Args:
        metric: Name of the metric, with or without the prefix `eval_`.

    Raises:
        ValueError: Drafts cannot be compared by this metric.
    """
    name = metric.removeprefix("eval_")
    if name not in GREATER_IS_BETTER:
        (nearest,) = difflib.get_close_matches(name, GREATER_IS_BETTER, 1, cutoff=0.0)
        raise ValueError(
            f"metric_for_best_model must be one of {list(GREATER_IS_BETTER)}, got metric_for_best_model={metric}; "
            f"did you mean {nearest}?"
        )
    return GREATER_IS_BETTER[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Unit:
    """One batch of documents, all from the same shard."""

    store: int
    shard: int
    places: tuple[int, ...]
    """Positions of the documents within the shard."""
    tokens: int
    """Number of tokens of the batch, padding included."""


class HeldOut(Dataset[tuple[int, int]]):
    """The held-out documents of a dataset, prepared for repeated evaluation.

    The batches do not depend on the number of ranks. On the same hardware the metrics are therefore identical to the
    last bit for any number of ranks.

    Attributes:
        documents: The held-out documents as (store, document) pairs.
        metrics: Names of the metrics that `evaluate` computes: all of them if every store has a finished target layer,
            otherwise `label_nll` only.
    """

    def __init__(self, dataset: DocumentDataset, *, at_most: int | None = None, batch_size: int = 8) -> None:
        """Plans the batches. Nothing is read yet.

        Args:
            dataset: The dataset whose held-out documents are evaluated.
            at_most: Maximum number of documents. Those with the lowest digests are kept; None keeps all.
            batch_size: Number of documents in a batch if each of them is as long as the longest held-out document. A
                batch of shorter documents holds more of them, up to the same number of tokens (padding included).

        Raises:
            ValueError: No document is held out.
        """
        self.documents = dataset.order.held_out(at_most)
        if not self.documents:
            raise ValueError(
                "eval_fraction must be large enough to hold out at least one document, got a fraction that holds out "
                f"none of {dataset.order.num_documents} documents; give a larger --eval_fraction"
            )
        self._stores = dataset.stores
        layers = [store.layers.get("target") for store in self._stores]
        self._reads_target = all(layer is not None and not layer.gaps and not layer.stale for layer in layers)
        self.metrics = (*COMPARED, "label_nll") if self._reads_target else ("label_nll",)
        self._units = list(_plan(dataset, self.documents, batch_size))
        self._kept: dict[_Unit, StoredDocuments] = {}
        self._kept_bytes = 0

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, place: int) -> tuple[int, int]:
        return self.documents[place]

    def check_metric(self, metric: str) -> None:
        """Raises ValueError if this dataset cannot compute a metric."""
        if metric.removeprefix("eval_") not in self.metrics:
            raise ValueError(
                f"metric_for_best_model must be {' or '.join(self.metrics)} if a store has no finished target, got "
                f"metric_for_best_model={metric}; give --metric_for_best_model {self.metrics[-1]}"
            )

    def evaluate(self, lm: SplitLM, accelerator: Accelerator) -> dict[str, float]:
        """Evaluates a draft on all held-out documents. Each rank evaluates a part of them.

        Args:
            lm: The draft. Dropout is off during the evaluation.
            accelerator: The accelerator that all ranks share. Every rank must call this method.

        Returns:
            The mean of each metric over the rows, keyed by its name; NaN if there are no rows. Also `documents` and
            `rows`, the numbers of documents and rows; `runtime`, in seconds; and `rows_per_second`. All values except
            `runtime` and `rows_per_second` are the same on all ranks.
        """
        began = time.monotonic()
        names = ("rows", *self.metrics)
        # Each batch has its own line of sums. The lines are added at the end in a fixed order, so that the result does
        # not depend on how the batches are spread over ranks.
        sums = torch.zeros(len(self._units), len(names), dtype=torch.float64)
        with evaluating(lm.model):
            for number, part in self._read(share(self._units, accelerator.process_index, accelerator.num_processes)):
                # With this limit on the tokens, all documents of the part form one batch, as planned.
                for batch in batches(part.shard, part.shard.ids.size * len(part.shard)):
                    found = batch_sums(lm, part, batch)
                    sums[number] = torch.tensor([found[name] for name in names], dtype=torch.float64)
        if accelerator.num_processes > 1:
            # Each batch was evaluated on one rank only, and the other ranks add zeros, so the sum is exact.
            sums = accelerator.reduce(sums.to(accelerator.device), "sum").cpu()
        rows, *totals = sums.sum(0).tolist()
        seconds = time.monotonic() - began
        return {
            **{name: total / rows if rows else math.nan for name, total in zip(self.metrics, totals, strict=True)},
            "documents": len(self),
            "rows": round(rows),
            "runtime": round(seconds, 4),
            "rows_per_second": round(rows / max(seconds, 1e-9)),
        }

    def _read(self, numbers: Iterable[int]) -> Iterator[tuple[int, StoredDocuments]]:
        """Yields the number and the documents of each batch.

        A shard is read once for all its batches. Documents stay in memory for later evaluations, up to KEPT_BYTES in
        all.
        """
        for (store, shard), group in groupby(numbers, lambda n: (self._units[n].store, self._units[n].shard)):
            whole: StoredDocuments | None = None
            for number in group:
                unit = self._units[number]
                part = self._kept.get(unit)
                if part is None:
                    if whole is None:
                        # The shard is read only if one of its batches is not kept in memory.
                        whole = read_documents(self._stores[store], shard, reads_target=self._reads_target)
                    part = whole.chosen(np.array(unit.places))
                    if self._kept_bytes + part.nbytes <= KEPT_BYTES:
                        self._kept[unit] = part
                        self._kept_bytes += part.nbytes
                yield number, part


def _plan(dataset: DocumentDataset, documents: list[tuple[int, int]], batch_size: int) -> Iterator[_Unit]:
    """Yields the batches, shard by shard."""
    located = [(store, *dataset.stores[store].locate(document), document) for store, document in documents]
    lengths = {
        (store, document): dataset.order.tokens(Pack(store=store, shard=shard, documents=(document,)))
        for store, shard, _, document in located
    }
    batch_tokens = batch_size * max(lengths.values())
    # The documents are ordered by store and number, so those of one shard are neighbours, as groupby needs.
    for (store, shard), group in groupby(located, lambda found: found[:2]):
        members = list(group)
        sizes = np.array([lengths[store, document] for _, _, _, document in members])
        for some in plan_batches(sizes, batch_tokens):
            yield _Unit(
                store=store,
                shard=shard,
                places=tuple(members[i][2] for i in some),
                tokens=len(some) * int(sizes[some].max()),
            )


def share(units: list[_Unit], rank: int, ranks: int) -> list[int]:
    """Returns the indices of the batches that one rank evaluates.

    A rank gets consecutive batches, because they often belong to the same shard. All ranks get about the same number of
    tokens.

    Args:
        units: All batches.
        rank: Number of the rank, from 0.
        ranks: Number of ranks.
    """
    # All tokens are divided into one equal share per rank. A batch goes to the rank whose share holds the batch's
    # middle.
    ends = np.cumsum([unit.tokens for unit in units])
    middles = ends - [unit.tokens / 2 for unit in units]
    return np.flatnonzero((middles * ranks // ends[-1]).astype(int) == rank).tolist()
