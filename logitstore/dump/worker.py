"""Dumps shards one by one: reads tokens, scores, writes. A plain class: `pipeline` wraps it for Ray."""

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
    from collections.abc import Collection, Mapping, Sequence

    from logitstore.format.commit import Commit
    from logitstore.rows.shard import Shard
    from logitstore.storage.storage import Storage


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
        made_by: Mapping[str, str] = MappingProxyType({}),
        max_kl: float | None = None,
    ) -> None:
        """Loads the models.

        Args:
            storage: A store with tokens, and with the layers to be filled created.
            target: The target, or None if its rows are all there.
            references: Models whose losses are wanted, by name.
            batch_tokens: Most tokens of a forward, padding included.
            device: Such as "cpu" or "cuda".
            num_threads: CPU threads of torch; None leaves its default.
            made_by: Digests of the specs that layers must have, by layer; what is not named may be anybody's.
            max_kl: Most nats that storing may lose of a row, on average over those measured of a shard; None for any.

        Raises:
            IdentityError: A layer has another spec by now.
        """
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self._storage = storage
        self._store = Store(storage)
        layers = [*(["target"] if target else []), *(losses_layer(name) for name in references)]
        check_makers(storage, made_by)  # from here on each write sees whether another job began a layer anew
        self._made_by = {layer: self._store.layers[layer].made_by for layer in layers}
        self._writers = {layer: LayerWriter(storage, self._store.spec, layer) for layer in layers}
        self._target_spec = self._store.spec.target
        self._batch_tokens = batch_tokens
        self._max_kl = max_kl
        self._device = device
        with loading_bars(False):  # one of each actor
            self._target = None if target is None else self._load(target, "target")
            self._references = {name: self._load(source, f"reference {name}") for name, source in references.items()}
        self._device_lock = threading.Lock()

    def _load(self, source: ModelSource, what: str) -> SplitLM:
        model = load_model(source, what=what, device=self._device)
        lm = SplitLM(model, self._store.spec.tokenizer.vocab_size)
        check_halves(lm)
        return lm

    def dump(self, shard_number: int, layers: Sequence[str], retry: Collection[str] = ()) -> list[Commit]:
        """Computes what some layers of a shard lack, and writes it.

        What is committed stays, unless it is of no use: stale, or of a job that lost the layer to another model before
        it had written anything. Such a commit is taken back once there are values to put in its place. Documents that
        a model fails with are set aside in the layer's commit, and the others are written.

        Args:
            shard_number: Which shard; its tokens are committed.
            layers: `target` and `losses/<name>` in any order; losses without `target` read the rows from the store.
            retry: Names of commit records that are to give way too, because documents are set aside in them.

        Returns:
            The commit records of what was computed, in the order written.

        Raises:
            ValueError: A model fails with every document. Nothing is written.
            FidelityError: Storing the target's rows would lose more than `max_kl`. Nothing is written.
            IdentityError: Another job writes one of the layers with another model.
            DamagedShardError: What is there of the shard is not as committed.
            torch.AcceleratorError: The device cannot be used any more, nor can this object.
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
        if is_wanted("target", shard.tokens_digest):
            scored["target"], shard, exact = self._score_target(shard)
        elif (target := there.get("target")) is not None:
            if not any(is_wanted(layer, target.digest) for layer in layers if layer != "target"):
                return []
            shard = self._read(shard_number, ("tokens", "target"))
        for name, reference in self._references.items():
            if is_wanted(losses_layer(name), shard.target_digest):
                scored[losses_layer(name)] = self._score_losses(reference, shard, exact)
        exact = None  # its memory is the device's
        written: list[Commit] = []
        for layer, values in scored.items():
            commit = self._write(layer, shard, values, there[layer], started)
            if commit is not None:
                written.append(commit)
            if commit is None or (layer == "target" and commit.digest != shard.target_digest):
                # Another writer was first. Losses must be of the rows that are there now.
                left = list(scored)[len(written) :]
                return [*written, *(self.dump(shard_number, left, retry) if left else [])]
        return written

    def _is_useless(self, commit: Commit, computed_from: str | None) -> bool:
        return commit.computed_from != computed_from or commit.made_by != self._made_by[commit.layer]

    def _read(self, shard_number: int, layers: tuple[str, ...]) -> Shard:
        try:
            return self._store.read_shard(shard_number, layers)
        except (LayerNotFoundError, IdentityError, DamagedShardError):
            self._store = Store(self._storage)  # it may have been committed or replaced since this was opened
            return self._store.read_shard(shard_number, layers)

    def _score_target(self, shard: Shard) -> tuple[Scored, Shard, Exact]:
        """Scores a shard, and measures what is lost.

        Returns:
            What is to be written; the shard as it will be read, without what is set aside, and with rows where there
            are references; whole distributions of the rows measured.
        """
        if self._target is None or self._target_spec is None:
            raise ValueError(f"layers must not include target where none was loaded, got shard {shard.index}")
        spec, measured = self._target_spec, choose(shard)
        with self._device_lock:
            scored = score_target(self._target, shard, spec, batch_tokens=self._batch_tokens, keep=measured)
            again = score_again(self._target, shard, scored.exact.rows)
        exact = scored.exact
        rows = codec.decode(codec.of_rows(scored.arrays, exact.rows), spec)
        scored = replace(scored, exact=NOTHING, fidelity=measure_target(exact, again, rows, spec))
        check_budget(scored.fidelity, spec, self._max_kl, shard.index)
        # Losses are computed on what readers will see, not on what the target said.
        rows_read = codec.decode(scored.arrays, spec) if self._references else None
        digest = layer_digest("target", scored.arrays)
        return scored, replace(without(shard, scored.set_aside), rows=rows_read, target_digest=digest), exact

    def _score_losses(self, reference: SplitLM, shard: Shard, exact: Exact | None = None) -> Scored:
        if shard.rows is None:
            raise ValueError(f"layers must include target where the store has none, got shard {shard.index}")
        rows, keep = shard.rows, NO_ROWS if exact is None else exact.rows
        with self._device_lock:
            scored = score_losses(reference, shard, rows, batch_tokens=self._batch_tokens, keep=keep)
        if exact is None:
            return scored
        return replace(scored, exact=NOTHING, fidelity=measure_losses(exact, scored.exact, rows))

    def _write(
        self, layer: str, shard: Shard, values: Scored, replaced: Commit | None, started: float
    ) -> Commit | None:
        """Writes one layer of a shard.

        Returns:
            What is committed now, of this writer or of another; None if that is of no use.
        """
        computed_from = shard.tokens_digest if layer == "target" else shard.target_digest
        # What was tried again gives way only to more of the same: a retry on a smaller device may fail with others.
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
            # Either the layer is another job's now, or one that lost it to this job was late with a last shard.
            check_makers(self._storage, {layer: self._made_by[layer]})
            return None
        return None if self._is_useless(commit, computed_from) else commit

    def _take_back(self, commit: Commit) -> None:
        """Makes way for other values, unless another writer did so already."""
        check_makers(self._storage, {commit.layer: self._made_by[commit.layer]})
        now = find_commit(self._storage, commit.layer, commit.shard)
        if now is not None and now.name == commit.name:
            take_back(self._storage, commit.layer, commit.shard)
