"""Scores a shard: computes the target's rows, or the losses of another model on these rows. Uses a GPU, but no Ray.

The full [batch, tokens, vocabulary] tensor never exists: the head runs only on rows that count, one chunk at a time.
The host receives only a few numbers and at most K entries per row.

A document that cannot be computed is set aside: its rows are empty, as if its loss mask were 0. The other documents of
the shard keep their numbers. If the same models score a shard again on the same device, they compute the same bytes.

N: number of rows that count. R: number of rows in the shard. K: largest number of entries in a row. V: vocabulary size.
H: hidden size.
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
from logitstore.rows.codec import round_mantissa

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
"""Arrays that hold the logarithm of a probability. The values may be minus infinity, because the probability may be
0."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """The values of one layer of a shard."""

    arrays: dict[str, NDArray[Any]]
    """Arrays by name, in the form in which they are stored (docs/format.md). Rows of documents that were set aside are
    stored like rows whose loss mask is 0."""
    set_aside: dict[int, str]
    """For each document that could not be computed, the reason. The keys are the numbers of the documents in the shard,
    in ascending order."""
    exact: Exact
    """Exact distributions of the rows that the caller asked for, without rows of documents that were set aside."""
    fidelity: dict[str, float] = field(default_factory=dict)
    """Fidelity measured on the rows in `exact`: sums by name (docs/fidelity.md)."""


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
        shard: Tokens and loss mask of the documents.
        spec: Truncation scheme and codebook.
        batch_tokens: Largest number of tokens in a forward pass, including padding.
        keep: Positions in the shard, in ascending order, of the rows for which exact distributions are also returned.
            These rows must count. They should be few, because each distribution takes 4 * V bytes on the device.
        progress: Called after each computed batch with the number of the batch's rows that count.

    Returns:
        The arrays of the shard's `target` layer, the reasons for documents that are set aside, and the exact
        distributions of the rows in `keep`. Masked rows and rows of documents that are set aside have count 0, no
        entries, and NaN for their other numbers. A document is set aside in two cases: the model raises one of
        MODEL_ERRORS on this document alone; or a counted row of the document has an entropy that is not finite, or a
        tail or label logprob that is NaN or plus infinity.

    Raises:
        ValueError: No document with rows that count could be computed.
        torch.AcceleratorError: The device is no longer usable; a new process is needed.
    """
    room = spec.room
    counted = np.flatnonzero(shard.loss_mask)
    # `rank` is the place of each row among the rows that count. Only these rows get memory for entries.
    rank = np.zeros(len(shard.ids), dtype=np.intp)
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
    # `_blank` has cleared the floats of these documents. Without entries, their rows are stored like masked ones.
    counts[rows_of(shard, set_aside)] = 0
    used = np.arange(room) < counts[counted][:, None]
    arrays = codec.pack(counts=counts, token_ids=token_ids[used], codes=codes[used], draws=draws[used], **floats)
    return Scored(arrays=arrays, set_aside=set_aside, exact=without(exact, shard, set_aside))


@torch.no_grad()
def score_again(lm: SplitLM, shard: Shard, rows: NDArray[np.intp]) -> Exact:
    """Runs the target a second time, on each document alone. This run, the control, measures the numerical noise.

    Args:
        lm: The target.
        shard: Tokens and loss mask of the documents.
        rows: Positions in the shard, in ascending order, of the rows that were measured in the first run.

    Returns:
        Exact distributions of the rows that `control_of` selects, without rows that fail or give NaN in the second run.
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

    # With a limit of one token, each document is a batch of its own, unlike in the first run.
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
    """Runs a model over a shard and computes its soft cross entropy with the target's stored rows.

    Args:
        lm: A reference, or an untrained draft.
        shard: Tokens and loss mask of the documents. The loss mask must be 0 in documents that were set aside in the
            target's rows (`batch_runner.without`).
        rows: The target's rows of the shard, decoded from their stored form.
        batch_tokens: Largest number of tokens in a forward pass, including padding.
        keep: Positions in the shard, in ascending order, of the rows for which exact distributions are also returned.
            These rows must count. They should be few, because each distribution takes 4 * V bytes on the device.
        progress: Called after each computed batch with the number of the batch's rows that count.

    Returns:
        The arrays `ce` and `label_logprob`, the reasons for documents that are set aside, and the exact distributions
        of the rows in `keep`. Both arrays are float32 [R], in nats, with NaN for masked rows and for rows of documents
        that are set aside. A document is set aside in two cases: the model raises one of MODEL_ERRORS on this document
        alone; or a counted row of the document has a cross entropy that is not finite, or a label logprob that is NaN
        or plus infinity.

    Raises:
        ValueError: No document with rows that count could be computed.
        torch.AcceleratorError: The device is no longer usable; a new process is needed.
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
    """Runs the backbone on a batch. Returns hidden states [N, H] of the rows that count, and their labels [N]."""
    ids = torch.from_numpy(batch.ids).to(lm.device, non_blocking=True)
    places = torch.from_numpy(batch.places).to(lm.device, non_blocking=True)
    labels = torch.from_numpy(batch.labels).to(lm.device, non_blocking=True)
    return lm.hidden(ids).flatten(0, 1)[places], labels


def _chunks(num_rows: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def _blank(values: Mapping[str, NDArray[np.float32]], shard: Shard, raised: dict[int, str]) -> dict[int, str]:
    """Finds the documents that could not be computed, and sets the values of their rows to NaN in place.

    Args:
        values: Arrays [R] by name, such as the entropy of each row; NaN for rows that were not computed.
        shard: Tokens and loss mask of the documents.
        raised: For each document on which the model raised an error, the reason. The keys are the numbers of the
            documents in the shard.

    Returns:
        For each document that must be set aside, the reason. The keys are the numbers of the documents in the shard, in
        ascending order.

    Raises:
        ValueError: All documents with rows that count would be set aside.
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
    # A document on which the model raised an error has NaN rows too. The error is the better reason. It wins, because
    # `raised` is the right operand of the union.
    set_aside = dict(sorted((not_finite | raised).items()))
    if set_aside and len(set_aside) == len(np.unique(documents_of(shard, np.flatnonzero(shard.loss_mask)))):
        document, reason = next(iter(set_aside.items()))
        next_step = "check that it runs on one of them" if document in raised else "try --dtype float32"
        raise ValueError(
            f"model must score at least one document of shard {shard.index}, got {len(set_aside)} that all fail "
            f"(document {document}: {reason}); {next_step}"
        )
    blank = rows_of(shard, set_aside)
    for part in values.values():
        part[blank] = np.nan
    return set_aside
