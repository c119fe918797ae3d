"""Dumps shards: reads their tokens, runs the models, and writes the values. Uses no Ray: actors.py makes the actors."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch

from logitstore.dump.missing import check_makers
from logitstore.dump.scoring.batch_runner import without
from logitstore.dump.scoring.measuring import (
    NO_ROWS,
    NOTHING,
    Exact,
    check_budget,
    choose,
    measure_losses,
    measure_target,
)
from logitstore.dump.scoring.score import Scored, score_again, score_losses, score_target
from logitstore.errors import DamagedShardError, IdentityError, LayerNotFoundError
from logitstore.format.commit import layer_digest
from logitstore.format.layout import losses_layer
from logitstore.models.loading import ModelSource, load_model, loading_bars
from logitstore.models.probes import check_halves
from logitstore.models.split_lm import SplitLM
from logitstore.rows import codec
from logitstore.store.commits.index import find_commit
from logitstore.store.reader import Store
from logitstore.store.take_back import take_back
from logitstore.store.writer import LayerWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from logitstore.format.commit import Commit
    from logitstore.rows.shard import Shard
    from logitstore.storage.storage import Storage


class ShardDumper:
    """Computes the target and losses layers of shards.

    `dump` may be called from two threads at once. While one shard is encoded and written, the next is on the device.
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
        made_by: Mapping[str, str] = MappingProxyType({}),
        max_kl: float | None = None,
    ) -> None:
        """Loads the models.

        Args:
            storage: Root of the store. The store must have tokens, and the layers to fill must exist.
            target: The target model; None if the layer `target` is not filled.
            references: Reference models by name, one for each losses layer that is to be filled.
            batch_tokens: Largest number of tokens in a forward pass, including padding.
            device: Device of the models, such as "cpu" or "cuda".
            num_threads: Number of CPU threads that torch uses; None for the default of torch.
            made_by: By layer, the digest that the layer's spec must have. Layers that are not in this mapping are not
                checked.
            max_kl: Largest loss, in nats per row, that storing the target's rows may cause. For each shard, the mean
                loss of the rows that are measured is compared with `max_kl`. None for no limit.

        Raises:
            IdentityError: The spec of a layer does not have the digest that `made_by` gives for this layer.
        """
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self._storage = storage
        self._store = Store(storage)
        layers = [*(["target"] if target else []), *(losses_layer(name) for name in references)]
        check_makers(storage, made_by)  # Every write checks this again.
        self._made_by = {layer: self._store.layers[layer].made_by for layer in layers}
        self._writers = {layer: LayerWriter(storage, self._store.spec, layer) for layer in layers}
        self._target_spec = self._store.spec.target
        self._batch_tokens = batch_tokens
        self._max_kl = max_kl
        self._device = device
        with loading_bars(False):  # Each actor would show its own bars.
            self._target = None if target is None else self._load(target, "target")
            self._references = {name: self._load(source, f"reference {name}") for name, source in references.items()}
        self._device_lock = threading.Lock()
        self._progress: dict[int, tuple[int, int]] = {}
        """For each running shard, the number of rows scored so far and the total number of rows to score. A row is
        counted once for each model that scores the row."""

    def _load(self, source: ModelSource, what: str) -> SplitLM:
        model = load_model(source, what=what, device=self._device)
        lm = SplitLM(model, self._store.spec.tokenizer.vocab_size)
        check_halves(lm)
        return lm

    def progress(self) -> dict[int, float]:
        """Returns the scored fraction, in [0, 1], of each running shard. Safe to call from another thread."""
        # The copy is needed because other threads change the dict meanwhile.
        return {shard: min(1.0, done / max(total, 1)) for shard, (done, total) in list(self._progress.items())}

    def _count(self, shard_number: int) -> Callable[[int], None]:
        def count(rows: int) -> None:
            done, total = self._progress.get(shard_number, (0, 0))
            self._progress[shard_number] = done + rows, total

        return count

    def dump(self, shard_number: int, layers: Sequence[str], retry: Collection[str] = ()) -> list[Commit]:
        """Computes and writes the layers that a shard lacks.

        A layer that is committed already is kept, unless its commit is useless. A commit is useless if it is stale, or
        if a job with another model wrote it for an earlier spec of the layer. A useless commit is taken back as soon as
        new values are ready. If a model fails with some documents, the layer's commit sets these documents aside, and
        the other documents are written.

        Args:
            shard_number: Number of a shard whose tokens are committed.
            layers: Layers to fill, in any order: `target` and `losses/<name>`. Without `target`, losses are computed on
                the target rows that are stored already.
            retry: Names of commit records that set documents aside. Their layers are computed again even if the commits
                are not useless. Such a commit is replaced only if the documents that this call sets aside are a proper
                subset of the documents that the commit sets aside.

        Returns:
            The commit records of the layers that were written, in the order of writing.

        Raises:
            ValueError: A model fails with every document. Nothing is written.
            FidelityError: Storing the target's rows would lose more than `max_kl`. Nothing is written.
            IdentityError: Another job writes one of the layers with another model.
            DamagedShardError: The stored bytes of the shard differ from what was committed.
            torch.AcceleratorError: The device, and with it this object, cannot be used any more.
        """
        started = time.monotonic()
        there = {layer: find_commit(self._storage, layer, shard_number) for layer in layers}

        def is_wanted(layer: str, computed_from: str | None) -> bool:
            if layer not in there:
                return False
            found = there[layer]
            return found is None or found.name in retry or self._is_useless(found, computed_from)

        shard = self._read(shard_number, ("tokens",) if "target" in layers else ("tokens", "target"))
        scored: dict[str, Scored] = {}
        exact: Exact | None = None
        # New target rows make all losses stale, so every model must run over the shard.
        is_new = is_wanted("target", shard.tokens_digest)
        passes = len(layers) if is_new else sum(is_wanted(layer, shard.target_digest) for layer in layers)
        self._progress[shard_number] = 0, int(shard.loss_mask.sum()) * passes
        if is_new:
            scored["target"], shard, exact = self._score_target(shard)
        elif (target := there.get("target")) is not None:
            if not any(is_wanted(layer, target.digest) for layer in layers if layer != "target"):
                return []
            shard = self._read(shard_number, ("tokens", "target"))
        for name, reference in self._references.items():
            if is_wanted(losses_layer(name), shard.target_digest):
                scored[losses_layer(name)] = self._score_losses(reference, shard, exact)
        exact = None  # This frees device memory for the shard that is scored while this one is written.
        self._progress.pop(shard_number, None)
        written: list[Commit] = []
        for layer, values in scored.items():
            commit = self._write(layer, shard, values, there[layer], started)
            if commit is not None:
                written.append(commit)
            if commit is None or (layer == "target" and commit.digest != shard.target_digest):
                # Another writer was first, so the remaining losses must be computed on the rows that it committed.
                left = list(scored)[len(written) :]
                return [*written, *(self.dump(shard_number, left, retry) if left else [])]
        return written

    def _is_useless(self, commit: Commit, computed_from: str | None) -> bool:
        return commit.computed_from != computed_from or commit.made_by != self._made_by[commit.layer]

    def _read(self, shard_number: int, layers: tuple[str, ...]) -> Shard:
        try:
            return self._store.read_shard(shard_number, layers)
        except (LayerNotFoundError, IdentityError, DamagedShardError):
            # The shard may have been committed or replaced after the store was opened.
            self._store = Store(self._storage)
            return self._store.read_shard(shard_number, layers)

    def _score_target(self, shard: Shard) -> tuple[Scored, Shard, Exact]:
        """Runs the target over a shard, and measures the fidelity of the target's rows.

        Returns:
            The values to write; the shard as readers will see it; and the exact distributions of the measured rows. In
            the returned shard, documents that are set aside are masked. The returned shard has target rows only if
            losses of reference models are computed too, because nothing else needs these rows.
        """
        if self._target is None or self._target_spec is None:
            raise ValueError(f"target must be loaded before its rows are computed, got none for shard {shard.index}")
        spec, measured = self._target_spec, choose(shard)
        with self._device_lock:
            scored = score_target(self._target, shard, spec, batch_tokens=self._batch_tokens, keep=measured,
                                  progress=self._count(shard.index))  # fmt: skip
            again = score_again(self._target, shard, scored.exact.rows)
        exact = scored.exact
        rows = codec.decode(codec.of_rows(scored.arrays, exact.rows), spec)
        scored = replace(scored, exact=NOTHING, fidelity=measure_target(exact, again, rows, spec))
        check_budget(scored.fidelity, spec, self._max_kl, shard.index)
        # Losses are computed on the rows as readers decode them, not on the exact distributions.
        rows_read = codec.decode(scored.arrays, spec) if self._references else None
        digest = layer_digest("target", scored.arrays)
        return scored, replace(without(shard, scored.set_aside), rows=rows_read, target_digest=digest), exact

    def _score_losses(self, reference: SplitLM, shard: Shard, exact: Exact | None = None) -> Scored:
        if shard.rows is None:
            raise ValueError(f"target rows must exist before losses are computed, got none for shard {shard.index}")
        rows, keep = shard.rows, NO_ROWS if exact is None else exact.rows
        with self._device_lock:
            scored = score_losses(reference, shard, rows, batch_tokens=self._batch_tokens, keep=keep,
                                  progress=self._count(shard.index))  # fmt: skip
        if exact is None:
            return scored
        return replace(scored, exact=NOTHING, fidelity=measure_losses(exact, scored.exact, rows))

    def _write(
        self, layer: str, shard: Shard, values: Scored, replaced: Commit | None, started: float
    ) -> Commit | None:
        """Writes one layer of a shard.

        Returns:
            The commit record that is valid after this call. If another writer was first, this is the record of that
            writer. None if that record is useless (see `dump`).
        """
        computed_from = shard.tokens_digest if layer == "target" else shard.target_digest
        # A retry may fail with other documents than before, for example on a smaller device. It replaces a commit only
        # if the documents that it sets aside are a proper subset of the documents that the commit sets aside.
        if replaced is not None and (
            self._is_useless(replaced, computed_from) or set(values.set_aside) < set(replaced.set_aside)
        ):
            self._take_back(replaced)
        try:
            commit = self._writers[layer].write(
                shard.index,
                values.arrays,
                documents=len(shard),
                rows=len(shard.ids),
                counted=int(without(shard, values.set_aside).loss_mask.sum()),
                computed_from=computed_from,
                started=started,
                set_aside=values.set_aside,
                fidelity=values.fidelity,
            )
        except IdentityError:
            # There are two possible causes. If another job owns the layer now, the next line raises. Otherwise, the job
            # that owned the layer before has just committed this shard.
            check_makers(self._storage, {layer: self._made_by[layer]})
            return None
        return None if self._is_useless(commit, computed_from) else commit

    def _take_back(self, commit: Commit) -> None:
        """Takes a commit back, unless another writer has replaced it already."""
        check_makers(self._storage, {commit.layer: self._made_by[commit.layer]})
        now = find_commit(self._storage, commit.layer, commit.shard)
        if now is not None and now.name == commit.name:
            take_back(self._storage, commit.layer, commit.shard)
