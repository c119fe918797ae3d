"""Store -> batches: the documents as a map-style dataset, the order they are read in, and how they are laid out.

Splitting over ranks, workers, epochs and resuming in mid-epoch are left to transformers and accelerate, which do it for
any sampler that is deterministic in its epoch. NumPy and torch only; nothing here knows a model.

B documents, T tokens of the longest, N rows whose loss mask is 1, K entries per row at most.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from logitstore.errors import IdentityError, LayerNotFoundError
from logitstore.layout import losses_layer
from logitstore.reader import CACHED_SHARDS
from logitstore.rows import Rows
from logitstore.set_aside import explain_missing

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from logitstore import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One document of T tokens."""

    ids: NDArray[np.uint32]
    """[T]"""
    loss_mask: NDArray[np.bool_]
    """[T]"""
    rows: Rows
    """The target's T rows."""
    reference_ce: NDArray[np.float32] | None
    """[T]: soft cross entropy of the reference, NaN where masked; None where none was asked for."""


class DocumentDataset(Dataset[Sample]):
    """The documents of a finished store, by number.

    Shards are decoded whole, and the store keeps the last few: an order that stays within as many shards at a time,
    as WindowShuffleSampler's does, decodes each shard once an epoch.

    Attributes:
        documents_per_shard: How many documents each shard holds, in order.

    Raises:
        LayerNotFoundError: The store lacks the target or the reference, or some shards of them.
        IdentityError: Some shards of them were computed from other values than the store holds now.
    """

    def __init__(self, store: Store, reference: str | None = None) -> None:
        if reference is not None:
            store.loss(reference)
        self._reference = reference
        self._layers = ("tokens", "target", *([] if reference is None else [losses_layer(reference)]))
        for name in self._layers:
            check_complete(store, name)
        self._store = store
        self._pid = os.getpid()
        self.documents_per_shard = store.layers["tokens"].index.documents[: store.num_shards].tolist()

    def __len__(self) -> int:
        return self._store.num_documents

    def __getitem__(self, document: int) -> Sample:
        store = self._opened_here()
        number, place = store.locate(document)
        shard = store.shard(number, layers=self._layers)
        found = shard.document(place)
        if found.rows is None:
            raise LayerNotFoundError(f"shard {number} must hold target rows, got none; dump the target first")
        ce = None if self._reference is None else shard.losses[self._reference]
        return Sample(
            ids=found.ids,
            loss_mask=found.loss_mask,
            rows=found.rows,
            reference_ce=None if ce is None else ce[shard.starts[place] : shard.starts[place + 1]],
        )

    def _opened_here(self) -> Store:
        # fsspec's asynchronous file systems refuse to work in a forked process: a worker opens the store anew
        if self._pid != os.getpid():
            self._store = copy.deepcopy(self._store)
            self._pid = os.getpid()
        return self._store


def check_complete(store: Store, layer: str) -> None:
    """Checks that a layer is there with every shard: training on part of a store would go unnoticed.

    Raises:
        LayerNotFoundError: It is not.
        IdentityError: Some shards were computed from other tokens or target rows than the store holds now: reading
            them would fail, hours later perhaps.
    """
    if layer not in store.layers:
        raise LayerNotFoundError(
            f"store must have a layer {layer!r}, got layers={list(store.layers)} in {store.url}; "
            "dump it first with jobs/dump_logits.py"
        )
    if missing := store.layers[layer].gaps:
        total = store.spec.num_shards
        there = total - store.layers[layer].num_missing
        raise LayerNotFoundError(
            f"layer {layer!r} must have all of its {total} shards, got {there} in {store.url} (shard "
            f"{missing[0].start} is the first missing); run the dump again to finish it"
            f"{explain_missing(store.storage, layer)}"
        )
    if stale := store.layers[layer].stale:
        raise IdentityError(
            f"layer {layer!r} must be computed from what the store holds now, got {len(stale)} stale shards in "
            f"{store.url} (shard {min(stale)} is the first); run the dump again, which replaces them"
        )


class WindowShuffleSampler(Sampler[int]):
    """Every document once an epoch: shards in random order, and documents in random order within a window of shards.

    The order depends on `seed` and the epoch alone, so that all ranks agree on it and a resumed run repeats it.

    Raises:
        ValueError: The window is empty, or wider than the shards that a store keeps decoded.
    """

    def __init__(self, documents_per_shard: Sequence[int], window: int = CACHED_SHARDS, seed: int = 0) -> None:
        check_window(window)
        self._first_document = np.cumsum([0, *documents_per_shard])
        self._window = window
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Sets which epoch the next iteration is."""
        self._epoch = epoch

    def __len__(self) -> int:
        return int(self._first_document[-1])

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self._seed, self._epoch])
        shards = rng.permutation(len(self._first_document) - 1)
        for start in range(0, len(shards), self._window):
            documents = [
                np.arange(self._first_document[shard], self._first_document[shard + 1])
                for shard in shards[start : start + self._window]
            ]
            yield from rng.permutation(np.concatenate(documents)).tolist()


def check_window(window: int) -> None:
    """Raises ValueError unless the shards of a window fit the store's cache, at least one."""
    if not 1 <= window <= CACHED_SHARDS:
        raise ValueError(
            f"shuffle_window must be between 1 and {CACHED_SHARDS}, the shards that stay decoded in memory, "
            f"got shuffle_window={window}; for a wider shuffle dump with a larger --shard_rows"
        )


def collate(samples: list[Sample]) -> dict[str, Tensor]:
    """Lays out documents as one batch: token ids padded on the right, and flat rows, those of loss mask 1 alone.

    Returns:
        input_ids: Int64 [B, T]; 0 beyond a document, which causal attention never looks at.
        rows: Int64 [N], where each row is in the flattened [B * T].
        token_ids, probs: Int64 and float32 [N, K], 0 beyond a row's entries.
        tail: Float32 [N], tail mass.
        weights, drawn_entropy: Float32 [N, K] and [N], only where entries were drawn.
        labels: Int64 [N], the token that follows in the document.
        reference_ce: Float32 [N], only if the samples have it.
    """
    width = max(len(sample.ids) for sample in samples)
    input_ids = np.zeros((len(samples), width), dtype=np.int64)
    for i, sample in enumerate(samples):
        input_ids[i, : len(sample.ids)] = sample.ids
    mask = np.concatenate([sample.loss_mask for sample in samples])
    place = np.concatenate([i * width + np.arange(len(sample.ids)) for i, sample in enumerate(samples)])[mask]
    joined = Rows.concatenate([sample.rows for sample in samples])
    (masked,) = np.nonzero(mask)
    target = joined.padded(masked)
    batch = {
        "input_ids": input_ids,
        "rows": place,
        "token_ids": target.token_ids,
        "probs": target.probs,
        "tail": target.tail,
        # a row of loss mask 1 is never its document's last
        "labels": input_ids.reshape(-1)[place + 1],
    }
    if target.weights is not None and target.entropy is not None:
        batch |= {"weights": target.weights, "drawn_entropy": target.entropy}
    ce = [sample.reference_ce for sample in samples if sample.reference_ce is not None]
    if ce:
        batch["reference_ce"] = np.concatenate(ce)[mask]
    return {name: torch.from_numpy(value) for name, value in batch.items()}
