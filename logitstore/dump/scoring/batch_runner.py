"""Runs the batches of a shard on a device, and finds the documents that a model raises with. Knows no Ray.

R rows.
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
"""What a model raises because of a document: an id or a position beyond a table (IndexError), a check of its own code
(ValueError; AssertionError in much code from the hub), anything within torch (RuntimeError), torch.OutOfMemoryError
among it. Everything else goes up: MemoryError is the host's, which scoring fewer documents does not help; TypeError
and the like are no document's fault."""

REASON_LENGTH = 200
"""Characters of a reason: it becomes part of a commit record, and torch's can be long."""


@dataclass(frozen=True, kw_only=True)
class _InFlight:
    """A batch whose numbers are on their way to the host."""

    batch: Batch
    on_host: list[Tensor]
    copied: torch.cuda.Event | None

    def wait(self) -> list[NDArray[Any]]:
        if self.copied is not None:
            # What a device reports only now, it does not recover from: an AcceleratorError, as below.
            self.copied.synchronize()
        return [part.numpy() for part in self.on_host]


def _start(batch: Batch, launch: Callable[[Batch], list[tuple[Tensor, ...]]]) -> _InFlight | str:
    """Launches a batch; why the model raised if it did."""
    try:
        on_device = [torch.cat(parts) for parts in zip(*launch(batch), strict=True)]
        on_host = [part.to("cpu", non_blocking=True) for part in on_device]
    except torch.AcceleratorError:
        # A RuntimeError too, but of the device, and from then on everything there fails: no document is to blame.
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
    """Runs a shard's batches, and those that fail again, in the end one document at a time.

    Args:
        shard: Its documents.
        batch_tokens: Most tokens of a forward, padding included.
        launch: Runs the model on a batch; tensors of N rows each, in parts, on the device.
        collect: Takes the same on the host, parts joined. Called once for each batch that the model took, in any order.

    Returns:
        The documents that the model raises one of MODEL_ERRORS with when each is alone, by their place in the shard,
        and which error.

    Raises:
        torch.AcceleratorError: The device cannot be used any more; a new process is needed.
    """
    waiting: _InFlight | None = None
    failed: list[Batch] = []
    for batch in batches(shard, batch_tokens):
        # Launched before the one before is collected, so that a GPU never waits for the host's copying.
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
    """Runs a batch that failed as it was, then one document at a time; returns as `run_batches`.

    Nothing else is on the device by now: memory that was short for a moment decides about no document, and changes no
    number by the shape that it was computed in. A device that was lost says so here at the latest.
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
    alone = replace(shard, loss_mask=shard.loss_mask & rows_of(shard, documents))
    reasons = {int(documents_of(shard, single.rows)[0]): attempt(single) for single in batches(alone, batch_tokens=1)}
    return {document: reason for document, reason in reasons.items() if reason is not None}


def documents_of(shard: Shard, rows: NDArray[np.intp]) -> NDArray[np.intp]:
    """Returns the document of each row."""
    return np.searchsorted(shard.starts, rows, side="right") - 1


def without(shard: Shard, documents: Collection[int]) -> Shard:
    """Returns a shard in which no row of some documents counts."""
    return replace(shard, loss_mask=shard.loss_mask & ~rows_of(shard, documents))


def rows_of(shard: Shard, documents: Collection[int] | NDArray[np.intp]) -> NDArray[np.bool_]:
    """Bool [R]: which rows are of some documents."""
    chosen = np.zeros(len(shard), dtype=bool)
    chosen[list(documents)] = True
    return np.repeat(chosen, shard.lengths)
