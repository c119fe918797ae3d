"""Runs the batches of a shard on a device, and finds the documents on which a model fails. Uses no Ray.

R: number of rows in the shard. N: number of rows in a batch that count.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from logitstore.rows.batches import batches

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from numpy.typing import NDArray
    from torch import Tensor

    from logitstore.rows.batches import Batch
    from logitstore.rows.shard import Shard

logger = logging.getLogger(__name__)

MODEL_ERRORS = (AssertionError, LookupError, RuntimeError, ValueError)
"""Errors that a document may cause in a model.

LookupError (such as IndexError): an id or a position lies beyond the end of a table. ValueError and AssertionError: a
check in the model's code failed; much code from the Hugging Face Hub uses assertions. RuntimeError: any error within
torch, including torch.OutOfMemoryError.

All other errors propagate to the caller. MemoryError means that the host is short of memory, and fewer documents in a
batch do not help. TypeError and similar errors are not caused by a document."""

REASON_LENGTH = 200
"""Maximum length of a reason, in characters. Reasons are stored in commit records, and torch's messages can be long."""


@dataclass(frozen=True, kw_only=True)
class _InFlight:
    """A batch whose results are being copied to the host."""

    batch: Batch
    on_host: list[Tensor]
    """Results on the host. Results from a GPU are complete only after the event `copied`."""
    copied: torch.cuda.Event | None
    """CUDA event that is recorded after the copies; None on a CPU, where the results are complete at once."""

    def wait(self) -> list[NDArray[Any]]:
        """Waits for the copies and returns the results.

        Raises:
            torch.AcceleratorError: The device failed while it computed the batch, and is no longer usable.
        """
        if self.copied is not None:
            self.copied.synchronize()
        return [part.numpy() for part in self.on_host]


def _start(batch: Batch, launch: Callable[[Batch], list[tuple[Tensor, ...]]]) -> _InFlight | str:
    """Launches a batch without waiting for its results.

    Returns:
        The batch in flight. If the model raises one of MODEL_ERRORS, the reason for the failure instead.
    """
    try:
        on_device = [torch.cat(parts) for parts in zip(*launch(batch), strict=True)]
        # The copies do not block, so that the next batch can be launched while they run.
        on_host = [part.to("cpu", non_blocking=True) for part in on_device]
    except torch.AcceleratorError:
        # This error is a RuntimeError too, but it is not the fault of a document: from now on, every operation on the
        # device fails.
        raise
    except MODEL_ERRORS as error:
        first_line = str(error).strip().partition("\n")[0].strip()
        return f"{type(error).__name__}{': ' if first_line else ''}{first_line}"[:REASON_LENGTH]
    copied = None
    if on_device[0].is_cuda:
        copied = torch.cuda.Event()
        copied.record()
    return _InFlight(batch=batch, on_host=on_host, copied=copied)


def run_batches(
    shard: Shard,
    batch_tokens: int,
    launch: Callable[[Batch], list[tuple[Tensor, ...]]],
    collect: Callable[[Batch, list[NDArray[Any]]], None],
) -> dict[int, str]:
    """Runs the batches of a shard. A failed batch runs again at the end, first as a whole, then document by document.

    Args:
        shard: Tokens and loss mask of the documents.
        batch_tokens: Largest number of tokens in a forward pass, including padding.
        launch: Runs the model on a batch. Returns the results in chunks of rows: a list with one tuple of tensors, on
            the device, for each chunk.
        collect: Receives a batch and its results on the host: one array of N rows for each tensor in a tuple from
            `launch`, with the rows of all chunks. Called once for each batch that was computed, in any order.

    Returns:
        For each document that fails, the reason. The keys are the numbers of the documents in the shard. A document
        fails if the model raises one of MODEL_ERRORS even when the model runs on this document alone.

    Raises:
        torch.AcceleratorError: The device is no longer usable; a new process is needed.
    """
    waiting: _InFlight | None = None
    failed: list[Batch] = []
    for batch in batches(shard, batch_tokens):
        # The batch is launched before the previous one is collected, so that a GPU never waits for the host.
        started = _start(batch, launch)
        if waiting is not None:
            collect(waiting.batch, waiting.wait())
        if isinstance(started, str):
            failed.append(batch)
            waiting = None
        else:
            waiting = started
    if waiting is not None:
        collect(waiting.batch, waiting.wait())
    reasons: dict[int, str] = {}
    for batch in failed:
        reasons |= _run_again(batch, shard, launch, collect)
    return reasons


def _run_again(
    batch: Batch,
    shard: Shard,
    launch: Callable[[Batch], list[tuple[Tensor, ...]]],
    collect: Callable[[Batch, list[NDArray[Any]]], None],
) -> dict[int, str]:
    """Runs a failed batch once more as a whole and, if it fails again, one document at a time.

    No other batch is on the device now. If memory was short only because of another batch, this batch succeeds as a
    whole. No document is then set aside, and the values are the same as without the failure, because the batch has the
    same shape.

    Returns:
        For each document that fails, the reason, in the form that `run_batches` returns.

    Raises:
        torch.AcceleratorError: The device is no longer usable.
    """

    def attempt(batch: Batch) -> str | None:
        started = _start(batch, launch)
        if isinstance(started, str):
            return started
        collect(batch, started.wait())
        return None

    if (reason := attempt(batch)) is None:
        return {}
    documents = np.unique(documents_of(shard, batch.rows))
    if len(documents) == 1:
        return {int(documents[0]): reason}
    logger.warning("%d documents of shard %d are run one by one: %s", len(documents), shard.index, reason)
    # With a limit of one token, each document is a batch of its own.
    alone = replace(shard, loss_mask=shard.loss_mask & rows_of(shard, documents))
    reasons = {int(documents_of(shard, single.rows)[0]): attempt(single) for single in batches(alone, batch_tokens=1)}
    return {document: reason for document, reason in reasons.items() if reason is not None}


def documents_of(shard: Shard, rows: NDArray[np.intp]) -> NDArray[np.intp]:
    """Returns, for each of the given rows, the number of its document within the shard."""
    return np.searchsorted(shard.starts, rows, side="right") - 1


def without(shard: Shard, documents: Collection[int]) -> Shard:
    """Returns a copy of a shard with loss mask 0 in the given documents. Documents are numbered within the shard."""
    return replace(shard, loss_mask=shard.loss_mask & ~rows_of(shard, documents))


def rows_of(shard: Shard, documents: Collection[int] | NDArray[np.intp]) -> NDArray[np.bool_]:
    """Returns a bool mask [R] that is True for the rows of the given documents."""
    chosen = np.zeros(len(shard), dtype=bool)
    chosen[list(documents)] = True
    return np.repeat(chosen, shard.lengths)
