"""Dumps shards one by one: reads tokens, scores, writes. A plain class: `pipeline` wraps it for Ray."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging as transformers_logging

from logitstore import codec
from logitstore.causal_lm import SplitLM, load_model
from logitstore.dump.scoring import score_losses, score_target
from logitstore.layout import losses_layer
from logitstore.reader import Shard, Store
from logitstore.writer import LayerWriter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from logitstore.commits import Commit
    from logitstore.rows import Rows
    from logitstore.storage import Storage


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """How to load a model."""

    name: str
    """Hugging Face id or folder."""
    revision: str | None = None
    dtype: str = "auto"
    """Of its weights; auto takes the checkpoint's."""
    attn_implementation: str | None = None
    """Of transformers; None for its default."""
    trust_remote_code: bool = False
    """Whether code from the model's repository may run."""


class ShardDumper:
    """Computes the target and losses layers of shards.

    Safe to call from two threads: while one shard is encoded and written, the next is on the device.
    """

    def __init__(
        self,
        storage: Storage,
        target: ModelSource | None,
        references: dict[str, ModelSource],
        *,
        batch_tokens: int,
        device: str,
        num_threads: int | None = None,
    ) -> None:
        """Loads the models.

        Args:
            storage: A store with tokens, and with the layers to be filled created.
            target: The target, or None if its rows are all there.
            references: Models whose losses are wanted, by name.
            batch_tokens: Most tokens of a forward, padding included.
            device: Such as "cpu" or "cuda".
            num_threads: CPU threads of torch; None leaves its default.
        """
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        transformers_logging.disable_progress_bar()
        self._store = Store(storage)
        self._batch_tokens = batch_tokens
        self._device = device
        self._target = None if target is None else self._load(target)
        self._references = {name: self._load(source) for name, source in references.items()}
        layers = [*(["target"] if target else []), *(losses_layer(name) for name in references)]
        self._writers = {layer: LayerWriter(storage, self._store.spec, layer) for layer in layers}
        self._device_lock = threading.Lock()

    def _load(self, source: ModelSource) -> SplitLM:
        model = load_model(
            source.name,
            revision=source.revision,
            dtype=source.dtype,
            attn_implementation=source.attn_implementation,
            trust_remote_code=source.trust_remote_code,
            device=self._device,
        )
        lm = SplitLM(model, self._store.spec.tokenizer.vocab_size)
        lm.check()
        return lm

    def dump(self, shard_number: int, layers: Sequence[str]) -> list[Commit]:
        """Computes some layers of a shard and writes them.

        Args:
            shard_number: Which shard; its tokens are committed.
            layers: `target` and `losses/<name>` in any order; losses without `target` read the rows from the store.

        Returns:
            The commit records, in the order written.
        """
        started = time.monotonic()
        shard = self._store.read_shard(shard_number, layers=("tokens",) if "target" in layers else ("tokens", "target"))
        names = [name for name in self._references if losses_layer(name) in layers]
        arrays: dict[str, dict[str, NDArray[Any]]] = {}
        with self._device_lock:
            rows = shard.rows
            if "target" in layers:
                arrays["target"], rows = self._score_target(shard)
            for name in names:
                if rows is None:
                    raise ValueError(f"layers must include target where the store has none, got layers={list(layers)}")
                arrays[losses_layer(name)] = score_losses(
                    self._references[name], shard, rows, batch_tokens=self._batch_tokens
                )
        digest = shard.target_digest
        written: list[Commit] = []
        for layer, values in arrays.items():
            commit = self._writers[layer].write(
                shard_number,
                values,
                documents=len(shard),
                rows=len(shard.ids),
                counted=int(shard.loss_mask.sum()),
                computed_from=shard.tokens_digest if layer == "target" else digest,
                started=started,
            )
            digest = commit.digest if layer == "target" else digest
            written.append(commit)
        return written

    def _score_target(self, shard: Shard) -> tuple[dict[str, NDArray[Any]], Rows]:
        spec = self._store.spec.target
        if self._target is None or spec is None:
            raise ValueError(f"layers must not include target where none was loaded, got shard {shard.index}")
        arrays = score_target(self._target, shard, spec, batch_tokens=self._batch_tokens)
        # Losses are computed on what readers will see, not on what the target said.
        return arrays, codec.decode(arrays, spec.codebook)
