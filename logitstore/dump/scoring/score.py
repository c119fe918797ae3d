"""A model and the documents of a shard -> the target's rows, or a model's losses on them. GPU work; knows no Ray.

The full [batch, tokens, vocabulary] tensor never exists: the head runs on rows that count, a chunk at a time, and what
crosses to the host is a few numbers and at most K entries per row.

A document that cannot be computed is set aside: its rows hold nothing, as if its loss mask were 0, and the others of
its shard keep their numbers. A shard scored again by the same models on the same device gives the same bytes.

N rows that count, R rows of the shard, K entries per row at most, V vocabulary, B batch, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from logitstore.dump.scoring.batch_runner import documents_of, rows_of, run_batches
from logitstore.dump.scoring.measuring import NO_ROWS, Exact, control_of, without
from logitstore.dump.scoring.truncation import truncate, uniforms
from logitstore.models.support import Support, normalised, on_support, soft_cross_entropy
from logitstore.rows import codec
from logitstore.rows.codec import MANTISSA_BITS, round_mantissa

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray
    from torch import Tensor

    from logitstore.format.spec import TargetSpec
    from logitstore.models.split_lm import SplitLM
    from logitstore.rows.batches import Batch
    from logitstore.rows.rows import Rows
    from logitstore.rows.shard import Shard

LOGS_OF_MASS = frozenset({"tail", "label_logprob"})
"""Numbers that may be minus infinity: the log of a probability of 0."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """The values of one layer of a shard."""

    arrays: dict[str, NDArray[Any]]
    """As stored (docs/format.md). Rows of documents that were set aside are as those whose loss mask is 0."""
    set_aside: dict[int, str]
    """Documents that could not be computed, by their place in the shard, ascending, and why."""
    exact: Exact
    """Whole distributions of the rows that were to be kept, without those of documents set aside."""
    fidelity: dict[str, float] = field(default_factory=dict)
    """What was measured with them, by name."""


@torch.no_grad()
def score_target(
    lm: SplitLM,
    shard: Shard,
    spec: TargetSpec,
    *,
    batch_tokens: int,
    keep: NDArray[np.intp] = NO_ROWS,
    progress: Callable[[int], object] | None = None,
) -> Scored:
    """Runs the target over a shard and truncates its distributions on the device.

    Args:
        lm: The target.
        shard: Tokens of the documents.
        spec: Truncation scheme and codebook.
        batch_tokens: Most tokens of a forward, padding included.
        keep: A few rows that count, whose exact distributions are wanted too.
        progress: Called with the number of rows of each batch that the model took.

    Returns:
        The arrays of the shard's `target` layer: counts 0, no entries and NaN where masked or set aside. A document is
        set aside if the model raises one of MODEL_ERRORS with it alone, or if a row of it that counts has an entropy
        that is not finite, or a tail or label logprob that is NaN or plus infinity.

    Raises:
        ValueError: Not one of the documents with rows that count could be computed.
        torch.AcceleratorError: The device cannot be used any more; a new process is needed.
    """
    room = spec.room
    counted = np.flatnonzero(shard.loss_mask)
    rank = np.zeros(len(shard.ids), dtype=np.intp)  # place of a row among those that count
    rank[counted] = np.arange(len(counted))
    token_ids = np.zeros((len(counted), room), dtype=np.uint32)
    codes = np.zeros((len(counted), room), dtype=np.uint8)
    draws = np.zeros((len(counted), room), dtype=np.uint16)
    uniform = uniforms(spec, shard.index, len(counted))
    counts = np.zeros(len(shard.ids), dtype=np.uint16)
    floats = {name: np.full(len(shard.ids), np.nan, dtype=np.float32) for name in ("tail", "label_logprob", "entropy")}
    boundaries = torch.from_numpy(spec.codebook.boundaries).to(lm.device)
    exact = Exact.of(keep, lm.vocab_size, lm.device)

    def launch(batch: Batch) -> list[tuple[Tensor, ...]]:
        hidden, labels = _hidden_rows(lm, batch)
        random = torch.from_numpy(uniform[rank[batch.rows]]).to(lm.device, non_blocking=True)
        parts: list[tuple[Tensor, ...]] = []
        for chunk in _chunks(len(hidden), lm.rows_per_chunk):
            logits = lm.logits(hidden[chunk])
            exact.keep(batch.rows[chunk], logits)
            parts.append(truncate(logits, labels[chunk], spec, boundaries, random[chunk]))
        return parts

    def collect(batch: Batch, parts: list[NDArray[Any]]) -> None:
        places = rank[batch.rows]
        token_ids[places], codes[places], draws[places], counts[batch.rows] = parts[:4]
        for values, part in zip(floats.values(), parts[4:], strict=True):
            values[batch.rows] = part
        if progress is not None:
            progress(len(batch.rows))

    raised = run_batches(shard, batch_tokens, launch, collect)
    set_aside = _blank(floats, shard, raised)
    counts[rows_of(shard, set_aside)] = 0
    used = np.arange(room) < counts[counted][:, None]
    arrays: dict[str, NDArray[Any]] = {
        "counts": counts,
        "gaps": codec.gaps(token_ids[used], counts),
        "logprobs": codes[used],
        "draws": draws[used],
        **{name: round_mantissa(values, MANTISSA_BITS) for name, values in floats.items()},
    }
    return Scored(arrays=arrays, set_aside=set_aside, exact=without(exact, shard, set_aside))


@torch.no_grad()
def score_again(lm: SplitLM, shard: Shard, rows: NDArray[np.intp]) -> Exact:
    """Runs the target over documents of some rows once more, each alone: how far it is from itself.

    Args:
        lm: The target.
        shard: Tokens of the documents.
        rows: Places of a few rows that count.

    Returns:
        The distributions of those rows that are cheap to compute (`control_of`), without documents that fail now.
    """
    control = control_of(shard, rows)
    exact = Exact.of(np.flatnonzero(control.loss_mask), lm.vocab_size, lm.device)
    is_there = np.zeros(len(shard.ids), dtype=bool)

    def launch(batch: Batch) -> list[tuple[Tensor, ...]]:
        logits = lm.logits(_hidden_rows(lm, batch)[0])
        exact.keep(batch.rows, logits)
        return [(logits.isnan().any(-1),)]

    def collect(batch: Batch, parts: list[NDArray[Any]]) -> None:
        is_there[batch.rows] = ~parts[0]

    run_batches(control, 1, launch, collect)
    return exact.only(is_there)


@torch.no_grad()
def score_losses(
    lm: SplitLM,
    shard: Shard,
    rows: Rows,
    *,
    batch_tokens: int,
    keep: NDArray[np.intp] = NO_ROWS,
    progress: Callable[[int], object] | None = None,
) -> Scored:
    """Runs a model over a shard and computes its soft cross entropy on the stored support.

    Args:
        lm: A reference, or an untrained draft.
        shard: Tokens of the documents; the loss mask is 0 where the target's rows hold nothing (`without`).
        rows: The target's rows as stored.
        batch_tokens: Most tokens of a forward, padding included.
        keep: A few rows that count, whose exact distributions are wanted too.
        progress: Called with the number of rows of each batch that the model took.

    Returns:
        `ce` and `label_logprob`, float32 [R] each, nats, NaN where masked or set aside. A document is set aside if the
        model raises one of MODEL_ERRORS with it alone, or if a row of it that counts has a cross entropy that is not
        finite, or a label logprob that is NaN or plus infinity.

    Raises:
        ValueError: Not one of the documents with rows that count could be computed.
        torch.AcceleratorError: The device cannot be used any more; a new process is needed.
    """
    values = {name: np.full(len(shard.ids), np.nan, dtype=np.float32) for name in ("ce", "label_logprob")}
    exact = Exact.of(keep, lm.vocab_size, lm.device)

    def launch(batch: Batch) -> list[tuple[Tensor, ...]]:
        hidden, labels = _hidden_rows(lm, batch)
        support = Support.of(rows.padded(batch.rows), lm.device)
        parts: list[tuple[Tensor, ...]] = []
        for chunk in _chunks(len(hidden), lm.rows_per_chunk):
            logits = lm.logits(hidden[chunk])
            exact.keep(batch.rows[chunk], logits)
            logprobs = normalised(logits)
            ce = soft_cross_entropy(support[chunk], *on_support(logprobs, support[chunk]))
            parts.append((ce, logprobs.gather(1, labels[chunk, None])[:, 0]))
        return parts

    def collect(batch: Batch, parts: list[NDArray[Any]]) -> None:
        for target, part in zip(values.values(), parts, strict=True):
            target[batch.rows] = part
        if progress is not None:
            progress(len(batch.rows))

    raised = run_batches(shard, batch_tokens, launch, collect)
    set_aside = _blank(values, shard, raised)
    arrays = {name: round_mantissa(part) for name, part in values.items()}
    return Scored(arrays=arrays, set_aside=set_aside, exact=without(exact, shard, set_aside))


def _hidden_rows(lm: SplitLM, batch: Batch) -> tuple[Tensor, Tensor]:
    """Runs the backbone; [N, H] of the rows that count, and their labels."""
    ids = torch.from_numpy(batch.ids).to(lm.device, non_blocking=True)
    places = torch.from_numpy(batch.places).to(lm.device, non_blocking=True)
    labels = torch.from_numpy(batch.labels).to(lm.device, non_blocking=True)
    return lm.hidden(ids).flatten(0, 1)[places], labels


def _chunks(num_rows: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def _blank(values: Mapping[str, NDArray[np.float32]], shard: Shard, raised: dict[int, str]) -> dict[int, str]:
    """Finds the documents that could not be computed, and makes their rows NaN in place.

    Args:
        values: Numbers by name, [R] each; NaN where nothing was computed.
        shard: Tokens of the documents.
        raised: Those that the model raised with, and what.

    Returns:
        All that are to be set aside, ascending, and why.

    Raises:
        ValueError: They are all that have rows that count.
    """
    not_finite: dict[int, str] = {}
    for name, part in values.items():
        fine = part < np.inf if name in LOGS_OF_MASS else np.isfinite(part)
        wrong = np.flatnonzero(~fine & shard.loss_mask)
        for document, first in zip(*np.unique(documents_of(shard, wrong), return_index=True), strict=True):
            place = wrong[first] - shard.starts[document]
            not_finite.setdefault(
                int(document), f"model must give finite numbers, got {name}={part[wrong[first]]} at row {place}"
            )
    set_aside = dict(sorted((not_finite | raised).items()))
    if set_aside and len(set_aside) == len(np.unique(documents_of(shard, np.flatnonzero(shard.loss_mask)))):
        document, reason = next(iter(set_aside.items()))
        next_step = "see that it runs on one of them" if document in raised else "try --dtype float32"
        raise ValueError(
            f"model must score a document of shard {shard.index} at least, got {len(set_aside)} that all fail, "
            f"document {document}: {reason}; {next_step}"
        )
    blank = rows_of(shard, set_aside)
    for part in values.values():
        part[blank] = np.nan
    return set_aside
