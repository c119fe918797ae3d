"""Evaluation during training: how a draft does on the documents that are held out, and which figures tell the best.

The figures are those of `trainer.evaluation.from_cache`, over the rows of these documents whose loss mask is 1.
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
"""Figures by which drafts may be compared, and whether the better one is the greater."""

KEPT_BYTES = 2**28
"""Decoded documents that stay in each process's memory between evaluations: 256 MiB, a million rows of 10 entries."""


def greater_is_better(metric: str) -> bool:
    """Tells whether the better draft is the one with more of a metric, named with or without `eval_`.

    Raises:
        ValueError: It is none by which drafts may be compared.
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
    """Documents of one shard that make a batch."""

    store: int
    shard: int
    places: tuple[int, ...]
    """In the shard."""
    tokens: int
    """Padding included."""


class HeldOut(Dataset[tuple[int, int]]):
    """The held-out documents of a dataset, which drafts are evaluated on again and again.

    Their batches are the same on any number of ranks, and so are the figures, to the last bit on the same hardware.

    Attributes:
        documents: Stores and numbers of the documents.
        metrics: What is found: all figures where every store has a finished target, label_nll alone otherwise.
    """

    def __init__(self, dataset: DocumentDataset, *, at_most: int | None = None, batch_size: int = 8) -> None:
        """Plans the batches, and reads nothing yet.

        Args:
            dataset: Whose documents, read as it reads them.
            at_most: So many documents alone, those of the lowest digests; all by default.
            batch_size: Documents of a batch of the longest ones; as many tokens are in those of shorter ones.

        Raises:
            ValueError: No document is held out.
        """
        self.documents = dataset.order.held_out(at_most)
        if not self.documents:
            raise ValueError(
                f"eval_fraction must be enough to hold a document out, got one that holds out none of "
                f"{dataset.order.num_documents}; give a larger one"
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
        """Raises ValueError if a metric is none that is found here."""
        if metric.removeprefix("eval_") not in self.metrics:
            raise ValueError(
                f"metric_for_best_model must be {' or '.join(self.metrics)} where a store has no target rows, got "
                f"metric_for_best_model={metric}; give that"
            )

    def evaluate(self, lm: SplitLM, accelerator: Accelerator) -> dict[str, float]:
        """Evaluates a draft, each rank on its share of the documents.

        Args:
            lm: The draft; runs without dropout for the while.
            accelerator: Of the ranks, which all call this.

        Returns:
            The means of `metrics` over the rows, the same on all ranks, NaN if there are none; and documents, rows,
            runtime (seconds), rows_per_second.
        """
        began = time.monotonic()
        names = ("rows", *self.metrics)
        sums = torch.zeros(len(self._units), len(names), dtype=torch.float64)
        with evaluating(lm.model):
            for number, part in self._read(share(self._units, accelerator.process_index, accelerator.num_processes)):
                for batch in batches(part.shard, part.shard.ids.size * len(part.shard)):
                    found = batch_sums(lm, part, batch)
                    sums[number] = torch.tensor([found[name] for name in names], dtype=torch.float64)
        if accelerator.num_processes > 1:
            # each batch is of one rank: adding zeros changes no bit
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
        """Reads batches by their numbers, a shard once for all of its own; keeps what there is room for."""
        for (store, shard), group in groupby(numbers, lambda n: (self._units[n].store, self._units[n].shard)):
            whole: StoredDocuments | None = None
            for number in group:
                unit = self._units[number]
                part = self._kept.get(unit)
                if part is None:
                    if whole is None:
                        whole = read_documents(self._stores[store], shard, reads_target=self._reads_target)
                    part = whole.chosen(np.array(unit.places))
                    if self._kept_bytes + part.nbytes <= KEPT_BYTES:
                        self._kept[unit] = part
                        self._kept_bytes += part.nbytes
                yield number, part


def _plan(dataset: DocumentDataset, documents: list[tuple[int, int]], batch_size: int) -> Iterator[_Unit]:
    """Yields the batches of each shard."""
    located = [(store, *dataset.stores[store].locate(document), document) for store, document in documents]
    lengths = {
        (store, document): dataset.order.tokens(Pack(store=store, shard=shard, documents=(document,)))
        for store, shard, _, document in located
    }
    batch_tokens = batch_size * max(lengths.values())
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
    """Returns the numbers of a rank's batches: neighbours, as they share shards, and as many tokens as of any rank."""
    ends = np.cumsum([unit.tokens for unit in units])
    middles = ends - [unit.tokens / 2 for unit in units]
    return np.flatnonzero((middles * ranks // ends[-1]).astype(int) == rank).tolist()
