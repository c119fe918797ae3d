"""Builds a batch: lays out packs of documents as tensors. Depends on NumPy and torch only.

A pack is the list of documents that share one sequence of the batch. Documents are given as NumPy arrays.

In the shapes of a batch, B is the number of packs, T the number of tokens in the longest pack, N the number of rows
whose loss mask is 1, and K the largest number of entries in a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from logitstore.rows.rows import Rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One document of T tokens."""

    ids: NDArray[np.uint32]
    """[T]: token ids."""
    loss_mask: NDArray[np.bool_]
    """[T]: true if the loss of predicting the next token is counted at this token. False at the document's last
    token."""
    rows: Rows | None
    """The target's distributions, one row for each of the T tokens; None if the target is not read."""
    columns: dict[str, NDArray[np.float32]]
    """Additional values of each token, [T] each, keyed by column name. The columns are those that the dataset was made
    with. In columns that hold losses or the target's entropy, values are NaN where the loss mask is 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Collator:
    """Callable that lays out packs of documents as the tensors of one micro-batch."""

    packing: bool
    """Whether a pack may hold several documents. If true, batches have `position_ids`."""
    reads_target: bool
    """Whether the batch holds the target's rows."""
    is_drawn: bool
    """Whether the entries of the target's rows were drawn at random (schemes `sample` and `hybrid`)."""
    columns: tuple[str, ...]
    """Names of the columns that every sample has."""

    def __call__(self, packs: Sequence[Sequence[Sample]]) -> dict[str, Any]:
        """Pads the token ids on the right, and concatenates the rows whose loss mask is 1.

        Args:
            packs: The documents of each pack. An empty list gives a batch of one token and no rows.

        Returns:
            input_ids: Int64 [B, T]. Padding has token id 0. The padding follows the documents, so with causal
                attention no document attends to the padding.
            position_ids: Int64 [B, T], only with packing. Positions begin at 0 in each document and in the padding.
            rows: Int64 [N], index of each row in the flattened [B * T] tokens.
            documents: Int64 [N], number of each row's document, counted from 0 within the batch.
            labels: Int64 [N], id of the token that follows each row in its document.
            token_ids, probs: Int64 and float32 [N, K], ids and probabilities of the target's entries. Rows with fewer
                than K entries are padded with 0. Only if the target is read.
            tail: Float32 [N], tail mass. Only if the target is read.
            weights: Float32 [N, K], weights of the entries. Only if the target is read and its entries were drawn.
            entropy: Float32 [N], the target's entropy in nats. Only if the target is read and its entries were drawn.
            columns: Columns, float32 [N] each, keyed by name. Only if samples have columns.
        """
        samples = [sample for pack in packs for sample in pack]
        # A rank without packs still runs every step with the other ranks, on a batch of one token.
        width = max((sum(len(sample.ids) for sample in pack) for pack in packs), default=1)
        input_ids = np.zeros((max(1, len(packs)), width), dtype=np.int64)
        position_ids = np.zeros_like(input_ids)
        starts = []
        for line, pack in enumerate(packs):
            start = 0
            for sample in pack:
                stop = start + len(sample.ids)
                input_ids[line, start:stop] = sample.ids
                position_ids[line, start:stop] = np.arange(stop - start)
                starts.append(line * width + start)
                start = stop
            position_ids[line, start:] = np.arange(width - start)
        counted = [np.flatnonzero(sample.loss_mask) for sample in samples]
        rows = _joined([start + places for start, places in zip(starts, counted, strict=True)], np.int64)
        batch = {
            "input_ids": input_ids,
            "rows": rows,
            "documents": np.repeat(np.arange(len(samples)), [len(places) for places in counted]),
            # The last row of a document has loss mask 0, so the next token belongs to the same document.
            "labels": input_ids.reshape(-1)[rows + 1],
        }
        if self.packing:
            batch["position_ids"] = position_ids
        if self.reads_target:
            batch |= self._target(samples)
        laid_out: dict[str, Any] = {name: torch.from_numpy(values) for name, values in batch.items()}
        if self.columns:
            columns = {
                name: [sample.columns[name][places] for sample, places in zip(samples, counted, strict=True)]
                for name in self.columns
            }
            laid_out["columns"] = {
                name: torch.from_numpy(_joined(values, np.float32)) for name, values in columns.items()
            }
        return laid_out

    def _target(self, samples: Sequence[Sample]) -> dict[str, NDArray[Any]]:
        """Returns the values of the batch that describe the target's rows."""
        parts = [sample.rows for sample in samples if sample.rows is not None]
        # An empty `Rows` is put in front, so that even a batch without samples has weights if entries were drawn.
        joined = Rows.concatenate([no_rows(is_drawn=self.is_drawn), *parts])
        (counted,) = np.nonzero(_joined([sample.loss_mask for sample in samples], np.bool_))
        found = joined.padded(counted)
        target: dict[str, NDArray[Any]] = {"token_ids": found.token_ids, "probs": found.probs, "tail": found.tail}
        if found.weights is not None and found.entropy is not None:
            target |= {"weights": found.weights, "entropy": found.entropy}
        return target


def no_rows(*, is_drawn: bool) -> Rows:
    """Returns a `Rows` object that holds 0 rows.

    Args:
        is_drawn: Whether the result has weights. Rows whose entries were drawn have weights, and they can be
            concatenated only with rows that have weights too.
    """
    nothing = np.empty(0, dtype=np.float32)
    return Rows(
        counts=np.empty(0, dtype=np.int64),
        token_ids=np.empty(0, dtype=np.uint32),
        logprobs=nothing,
        weights=nothing if is_drawn else None,
        tail_mass=nothing,
        label_logprob=nothing,
        entropy=nothing,
    )


def _joined(parts: Sequence[NDArray[Any]], dtype: type) -> NDArray[Any]:
    """Concatenates arrays of one dtype. Returns an empty array for an empty list, unlike np.concatenate."""
    return np.concatenate([np.empty(0, dtype=dtype), *parts])
