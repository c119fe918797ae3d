"""A model and the documents of a shard -> the target's rows, or a model's losses on them. GPU work; knows no Ray.

The full [batch, tokens, vocabulary] tensor never exists: the head runs on rows that count, a chunk at a time, and what
crosses to the host is a few numbers and at most K entries per row.

N rows that count, K entries per row at most, V vocabulary, B batch, T tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from logitstore.batches import batches
from logitstore.codec import round_mantissa
from logitstore.support import Support, on_support, soft_cross_entropy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray
    from torch import Tensor

    from logitstore.batches import Batch
    from logitstore.causal_lm import SplitLM
    from logitstore.reader import Shard
    from logitstore.rows import Rows
    from logitstore.spec import TargetSpec


@torch.no_grad()
def score_target(
    lm: SplitLM,
    shard: Shard,
    spec: TargetSpec,
    *,
    batch_tokens: int,
    progress: Callable[[int], object] | None = None,
) -> dict[str, NDArray[Any]]:
    """Runs the target over a shard and truncates its distributions on the device.

    Args:
        lm: The target.
        shard: Tokens of the documents.
        spec: Truncation scheme and codebook.
        batch_tokens: Most tokens of a forward, padding included.
        progress: Called with the number of rows after each batch.

    Returns:
        The arrays of the shard's `target` layer, as stored (docs/format.md).

    Raises:
        ValueError: The model gave something that is not a number.
    """
    k = spec.scheme.k
    counted = np.flatnonzero(shard.loss_mask)
    rank = np.zeros(len(shard.ids), dtype=np.intp)  # place of a row among those that count
    rank[counted] = np.arange(len(counted))
    token_ids = np.zeros((len(counted), k), dtype=np.uint32)
    codes = np.zeros((len(counted), k), dtype=np.uint8)
    counts = np.zeros(len(shard.ids), dtype=np.uint16)
    floats = {name: np.full(len(shard.ids), np.nan, dtype=np.float32) for name in ("tail", "label_logprob", "entropy")}
    boundaries = torch.from_numpy(spec.codebook.boundaries).to(lm.device)

    def launch(batch: Batch) -> list[tuple[Tensor, ...]]:
        hidden, labels = _hidden_rows(lm, batch)
        return [
            truncate(lm.logits(hidden[chunk]), labels[chunk], spec, boundaries)
            for chunk in _chunks(len(hidden), lm.rows_per_chunk)
        ]

    def collect(batch: Batch, parts: list[NDArray[Any]]) -> None:
        places = rank[batch.rows]
        token_ids[places], codes[places], counts[batch.rows] = parts[:3]
        for values, part in zip(floats.values(), parts[3:], strict=True):
            values[batch.rows] = part
        if progress is not None:
            progress(len(batch.rows))

    _run(batches(shard, batch_tokens), launch, collect)
    _refuse_nan(floats["entropy"], shard)
    used = np.arange(k) < counts[counted][:, None]
    return {
        "counts": counts,
        "token_ids": token_ids[used],
        "logprobs": codes[used],
        **{name: round_mantissa(values) for name, values in floats.items()},
    }


def truncate(logits: Tensor, labels: Tensor, spec: TargetSpec, boundaries: Tensor) -> tuple[Tensor, ...]:
    """Truncates distributions and codes what is kept, on the device.

    Args:
        logits: Float32 [N, V].
        labels: Int64 [N].
        spec: Truncation scheme.
        boundaries: The codebook's, float32 [255].

    Returns:
        Entries by falling probability, int32 [N, K] ids and uint8 [N, K] codes; int32 [N] how many of them are kept;
        float32 [N] log of the tail mass, label logprob and entropy.
    """
    scheme = spec.scheme
    logprobs = logits.log_softmax(-1)
    top = logprobs.topk(scheme.k, dim=-1)
    label = logprobs.gather(1, labels[:, None])[:, 0]
    probs = logprobs.exp()
    entropy = -torch.linalg.vecdot(probs, logprobs)
    # Summing what is left keeps a small tail true, where 1 - (sum of the kept) would be rounding error.
    tail = probs.scatter_(1, top.indices, 0.0).sum(-1)
    counts = torch.full_like(labels, scheme.k)
    if scheme.name == "nucleus":
        kept = top.values.exp()
        before = kept.cumsum(-1) - kept
        counts = (before < scheme.mass).sum(-1).clamp(scheme.k_min, scheme.k)
        dropped = torch.arange(scheme.k, device=labels.device) >= counts[:, None]
        tail = tail + kept.where(dropped, 0.0).sum(-1)
    codes = torch.bucketize(-top.values, boundaries)
    return top.indices.int(), codes.to(torch.uint8), counts.int(), tail.log(), label, entropy


@torch.no_grad()
def score_losses(
    lm: SplitLM,
    shard: Shard,
    rows: Rows,
    *,
    batch_tokens: int,
    progress: Callable[[int], object] | None = None,
) -> dict[str, NDArray[Any]]:
    """Runs a model over a shard and computes its soft cross entropy on the stored support.

    Args:
        lm: A reference, or an untrained draft.
        shard: Tokens of the documents.
        rows: The target's rows as stored.
        batch_tokens: Most tokens of a forward, padding included.
        progress: Called with the number of rows after each batch.

    Returns:
        `ce` and `label_logprob`, float32 [R] each, nats, NaN where masked.

    Raises:
        ValueError: The model gave something that is not a number.
    """
    values = {name: np.full(len(shard.ids), np.nan, dtype=np.float32) for name in ("ce", "label_logprob")}

    def launch(batch: Batch) -> list[tuple[Tensor, ...]]:
        hidden, labels = _hidden_rows(lm, batch)
        token_ids, probs = rows.padded(batch.rows)
        support = Support(
            token_ids=torch.from_numpy(token_ids).to(lm.device),
            probs=torch.from_numpy(probs).to(lm.device),
            tail=torch.from_numpy(rows.tail_mass[batch.rows]).to(lm.device),
        )
        parts: list[tuple[Tensor, ...]] = []
        for chunk in _chunks(len(hidden), lm.rows_per_chunk):
            logprobs = lm.logits(hidden[chunk]).log_softmax(-1)
            ce = soft_cross_entropy(support[chunk], *on_support(logprobs, support[chunk]))
            parts.append((ce, logprobs.gather(1, labels[chunk, None])[:, 0]))
        return parts

    def collect(batch: Batch, parts: list[NDArray[Any]]) -> None:
        for target, part in zip(values.values(), parts, strict=True):
            target[batch.rows] = part
        if progress is not None:
            progress(len(batch.rows))

    _run(batches(shard, batch_tokens), launch, collect)
    _refuse_nan(values["ce"], shard)
    return {name: round_mantissa(part) for name, part in values.items()}


def _hidden_rows(lm: SplitLM, batch: Batch) -> tuple[Tensor, Tensor]:
    """Runs the backbone; [N, H] of the rows that count, and their labels."""
    ids = torch.from_numpy(batch.ids).to(lm.device, non_blocking=True)
    places = torch.from_numpy(batch.places).to(lm.device, non_blocking=True)
    labels = torch.from_numpy(batch.labels).to(lm.device, non_blocking=True)
    return lm.hidden(ids).flatten(0, 1)[places], labels


def _chunks(num_rows: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def _run(
    work: Iterator[Batch],
    launch: Callable[[Batch], list[tuple[Tensor, ...]]],
    collect: Callable[[Batch, list[NDArray[Any]]], None],
) -> None:
    """Launches each batch before it collects the one before, so that a GPU never waits for the host's copying."""
    waiting: tuple[Batch, list[Tensor], torch.cuda.Event | None] | None = None
    for batch in work:
        on_device = [torch.cat(parts) for parts in zip(*launch(batch), strict=True)]
        on_host = [part.to("cpu", non_blocking=True) for part in on_device]
        copied = None
        if on_device[0].is_cuda:
            copied = torch.cuda.Event()
            copied.record()
        if waiting is not None:
            _collect(waiting, collect)
        waiting = (batch, on_host, copied)
    if waiting is not None:
        _collect(waiting, collect)


def _collect(
    waiting: tuple[Batch, list[Tensor], torch.cuda.Event | None],
    collect: Callable[[Batch, list[NDArray[Any]]], None],
) -> None:
    batch, on_host, copied = waiting
    if copied is not None:
        copied.synchronize()
    collect(batch, [part.numpy() for part in on_host])


def _refuse_nan(values: NDArray[np.float32], shard: Shard) -> None:
    wrong = np.flatnonzero(~np.isfinite(values) & shard.loss_mask)
    if len(wrong):
        document = int(np.searchsorted(shard.starts, wrong[0], side="right")) - 1
        raise ValueError(
            f"model must give finite numbers, got {values[wrong[0]]} at row {wrong[0] - shard.starts[document]} of "
            f"document {document} of shard {shard.index}; try --dtype float32"
        )
