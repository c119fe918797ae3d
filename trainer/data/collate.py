"""What a batch looks like: documents as they are read, and packs of them laid out as tensors. NumPy and torch only.

B packs, T tokens of the longest, N rows whose loss mask is 1, K entries per row at most.
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
    """[T]"""
    loss_mask: NDArray[np.bool_]
    """[T]"""
    rows: Rows | None
    """The target's T rows; None where the target is not read."""
    columns: dict[str, NDArray[np.float32]]
    """[T] each: what was asked for, by name; losses and entropy are NaN where masked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Collator:
    """Lays out packs as one micro-batch."""

    packing: bool
    """Whether packs may hold several documents."""
    reads_target: bool
    is_drawn: bool
    """Whether entries of the target were drawn."""
    columns: tuple[str, ...]
    """What samples have besides."""

    def __call__(self, packs: Sequence[Sequence[Sample]]) -> dict[str, Any]:
        """Lays out token ids padded on the right, and flat rows, those of loss mask 1 alone.

        Args:
            packs: Documents of each; none at all make a batch of one token and no rows.

        Returns:
            input_ids: Int64 [B, T]; 0 beyond a pack, which causal attention never looks at.
            position_ids: Int64 [B, T], only with packing: from 0 in each document, and in what is left of a pack.
            rows: Int64 [N], where each row is in the flattened [B * T].
            documents: Int64 [N], number of the row's document in the batch.
            labels: Int64 [N], the token that follows in the document.
            token_ids, probs: Int64 and float32 [N, K], 0 beyond a row's entries; only if the target is read.
            tail: Float32 [N], tail mass, likewise.
            weights, entropy: Float32 [N, K] and [N], only where entries were drawn.
            columns: The columns by name, float32 [N] each; only where there are some.
        """
        samples = [sample for pack in packs for sample in pack]
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
            # a row of loss mask 1 is never its document's last
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
        parts = [sample.rows for sample in samples if sample.rows is not None]
        joined = Rows.concatenate([no_rows(is_drawn=self.is_drawn), *parts])
        (counted,) = np.nonzero(_joined([sample.loss_mask for sample in samples], np.bool_))
        found = joined.padded(counted)
        target: dict[str, NDArray[Any]] = {"token_ids": found.token_ids, "probs": found.probs, "tail": found.tail}
        if found.weights is not None and found.entropy is not None:
            target |= {"weights": found.weights, "entropy": found.entropy}
        return target


def no_rows(*, is_drawn: bool) -> Rows:
    """Returns rows that are none."""
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
    return np.concatenate([np.empty(0, dtype=dtype), *parts])
