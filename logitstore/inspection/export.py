"""Exports a shard of a store as dense NumPy arrays, for frameworks that cannot read stores. Uses only NumPy.

R: number of rows in the shard. D: number of documents. K: largest number of entries in a row, at least 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from logitstore.errors import LayerNotFoundError
from logitstore.storage.local_disk import partial_file

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from logitstore.store.reader import Store


def dense(store: Store, shard: int) -> dict[str, NDArray[Any]]:
    """Reads a shard and pads its rows to rectangular arrays.

    Args:
        store: An open store with a target layer.
        shard: Number of the shard, from 0.

    Returns:
        The arrays by name:
        ids: uint32 [R], the tokens of the documents, one document after the other.
        loss_mask: bool [R], whether the prediction of each row counts.
        lengths: int64 [D], number of tokens of each document.
        counts: int64 [R], number of entries of each row; 0 where the loss mask is 0.
        token_ids: uint32 [R, K], in ascending order within a row; 0 after the last entry of a row.
        probs: float32 [R, K], probabilities of the tokens in `token_ids`; 0 after the last entry of a row.
        tail_mass: float32 [R], in [0, 1], NaN where the loss mask is 0. (The store holds the logarithm of this value.)
        label_logprob: float32 [R], logprob of the document's next token, NaN where the loss mask is 0.
        entropy: float32 [R], entropy of the whole distribution in nats, NaN where the loss mask is 0.
        weights: float32 [R, K], weights of the tokens in `token_ids`; 0 after the last entry of a row. The weights,
            together with 0 for all other tokens, are an unbiased estimate of the whole distribution. This array is
            present only if the entries of the store were drawn.

    Raises:
        LayerNotFoundError: The store has no target layer, or the shard is not committed.
        DamagedShardError: The stored bytes differ from what was committed.
        IdentityError: The target rows were computed from other tokens than the store holds now.
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


def write(store: Store, shard: int, out: str, *, overwrite: bool = False) -> Iterator[str]:
    """Writes the arrays of `dense` to an .npz file, and yields a line of text for each array.

    The file appears whole or not at all.

    Args:
        store: An open store with a target layer.
        shard: Number of the shard, from 0.
        out: Path of the file; must end in .npz.
        overwrite: Whether an existing file may be replaced.

    Raises:
        ValueError: `out` does not end in .npz, its folder does not exist, it cannot be written, or it exists and
            `overwrite` is False.
        LayerNotFoundError: The store has no target layer, or the shard is not committed.
        DamagedShardError: The stored bytes differ from what was committed.
        IdentityError: The target rows were computed from other tokens than the store holds now.
    """
    path = Path(out)
    if path.suffix != ".npz":
        raise ValueError(f"out must be a file name that ends in .npz, got out={out}; give another name")
    if not path.resolve().parent.is_dir():
        raise ValueError(f"out must be in a folder that exists, got out={out}; create the folder first")
    if path.exists() and not overwrite:
        raise ValueError(f"out must be a new file, got out={out}, which exists; give another name, or add --overwrite")
    # Typed as Any: since NumPy 2.2, savez also has the keyword allow_pickle, for which mypy does not accept an array.
    arrays: dict[str, Any] = dense(store, shard)
    try:
        with partial_file(path) as partial:
            # savez gets an open file: given the name of the partial file, savez would append .npz to that name.
            with partial.open("xb") as file:
                np.savez(file, **arrays)
            partial.replace(path)
    except OSError as error:
        raise ValueError(f"out must be a file that can be written, got out={out} ({error.strerror})") from error
    for name, array in arrays.items():
        yield f"{name:<14}{array.dtype!s:<9}{list(array.shape)}"
