"""A shard of a store as dense NumPy arrays, for frameworks that have no reader of stores. NumPy only.

R rows, D documents, K entries of the row that has most.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from logitstore.errors import LayerNotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from logitstore.store.reader import Store


def dense(store: Store, shard: int) -> dict[str, NDArray[Any]]:
    """Reads a shard and lays its rows out as rectangles.

    Args:
        store: With a target layer.
        shard: Which, from 0.

    Returns:
        ids: uint32 [R]; loss_mask: bool [R]; lengths: int64 [D], of the documents, which lie end to end.
        counts: int64 [R], entries of each row, 0 where the mask is 0.
        token_ids: uint32 [R, K] and probs: float32 [R, K], rising by id, both 0 beyond a row's entries.
        tail_mass, label_logprob, entropy: float32 [R], NaN where the mask is 0. The mass itself: a store has its log.
        weights: float32 [R, K], what entries stand for, only where they were drawn.

    Raises:
        LayerNotFoundError: There is no target, or no such shard of it.
        DamagedShardError: What is stored is not what was committed.
    """
    read = store.read_shard(shard, ("tokens", "target"))
    if read.rows is None:
        raise LayerNotFoundError(f"shard {shard} must hold target rows, got none; dump the target first")
    rows = read.rows
    everywhere = np.arange(len(rows))
    padded = rows.padded(everywhere)
    arrays: dict[str, NDArray[Any]] = {
        "ids": read.ids,
        "loss_mask": read.loss_mask,
        "lengths": read.lengths,
        "counts": rows.counts,
        "token_ids": padded.token_ids.astype(np.uint32),
        "probs": padded.probs,
        "tail_mass": rows.tail_mass,
        "label_logprob": rows.label_logprob,
        "entropy": rows.entropy,
    }
    if padded.weights is not None:
        arrays["weights"] = padded.weights
    return arrays


def write(store: Store, shard: int, out: str) -> Iterator[str]:
    """Writes what `dense` returns to an .npz file, whole or not at all, and says what is in it.

    Raises:
        ValueError: The file is no .npz file in a folder that is there.
    """
    path = Path(out)
    if path.suffix != ".npz" or not path.resolve().parent.is_dir():
        raise ValueError(f"out must be an .npz file in a folder that is there, got out={out}; make the folder first")
    # Any: savez has a keyword of its own, a bool, from NumPy 2.2 on; before, it takes every keyword for an array.
    arrays: dict[str, Any] = dense(store, shard)
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            np.savez(file, **arrays)
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise ValueError(f"out must be a file that can be written, got out={out} ({error.strerror})") from error
    for name, array in arrays.items():
        yield f"{name:<14}{array.dtype!s:<9}{list(array.shape)}"
