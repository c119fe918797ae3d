"""The arrays of each layer: names, types, shapes and paths in the Zarr hierarchy (docs/format.md, "Arrays")."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

from logitstore.format.spec import ROW_CHUNK

ENTRY_CHUNK = 2**16
"""Maximum number of entries in one inner chunk of a per-entry array."""

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""Pattern of the name of a losses layer. The name becomes the name of a folder."""


@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """One array of a layer."""

    name: str
    """Name of the array in its layer's group."""
    dtype: str
    """NumPy type with byte order, such as `<u4`."""
    per: Literal["row", "document", "entry"]
    """Whether the array has one value per "row", per "document" or per "entry". A shard has room for shard_rows rows,
    shard_rows documents and shard_rows * k entries, where k is the number of entries that a row has room for."""
    fill: float
    """Fill value: the value of all elements of the array that were never written."""


TOKENS = (
    ArraySpec(name="ids", dtype="<u4", per="row", fill=0),
    ArraySpec(name="loss_mask", dtype="|u1", per="row", fill=0),
    ArraySpec(name="lengths", dtype="<u4", per="document", fill=0),
    ArraySpec(name="digests", dtype="<u8", per="document", fill=0),
)
"""Arrays of the `tokens` layer."""
TARGET = (
    ArraySpec(name="counts", dtype="<u2", per="row", fill=0),
    ArraySpec(name="gaps", dtype="<u4", per="entry", fill=0),
    ArraySpec(name="logprobs", dtype="|u1", per="entry", fill=0),
    ArraySpec(name="draws", dtype="<u2", per="entry", fill=0),
    ArraySpec(name="tail", dtype="<f4", per="row", fill=np.nan),
    ArraySpec(name="label_logprob", dtype="<f4", per="row", fill=np.nan),
    ArraySpec(name="entropy", dtype="<f4", per="row", fill=np.nan),
)
"""Arrays of the `target` layer."""
LOSSES = (
    ArraySpec(name="ce", dtype="<f4", per="row", fill=np.nan),
    ArraySpec(name="label_logprob", dtype="<f4", per="row", fill=np.nan),
)
"""Arrays of every `losses/<name>` layer."""


def layer_arrays(layer: str) -> tuple[ArraySpec, ...]:
    """Returns the arrays of a layer, in the order in which the layer's digest covers them.

    Every reader and writer calls this function before it uses the name of a layer in a path. This keeps invalid names
    out of paths.

    Args:
        layer: `tokens`, `target` or `losses/<name>`.

    Raises:
        ValueError: `layer` cannot be the name of a layer.
    """
    if layer in ("tokens", "target"):
        return TOKENS if layer == "tokens" else TARGET
    if layer != losses_layer(layer.removeprefix("losses/")):
        raise ValueError(f"layer must be tokens, target or losses/NAME, got layer={layer!r:.80}")
    return LOSSES


def below(layer: str) -> str | None:
    """Returns the layer that `layer` is computed from; None for `tokens`."""
    # All layers but these two are losses, which are computed from `target`.
    return {"tokens": None, "target": "tokens"}.get(layer, "target")


def is_loss_name(name: str) -> bool:
    """Returns whether `name` can be the name of a losses layer."""
    # A folder named zarr.json would collide with the metadata of the group `losses`.
    return NAME_PATTERN.fullmatch(name) is not None and not name.endswith(".json")


def losses_layer(name: str) -> str:
    """Returns the name of the layer that holds the losses of a named model: `losses/<name>`.

    Raises:
        ValueError: `name` cannot be the name of a losses layer.
    """
    if not is_loss_name(name):
        raise ValueError(
            "reference name must consist of at most 64 letters, digits, dots, dashes and underscores, begin with a "
            f"letter or digit, and not end in .json, got name={name!r:.80}; change NAME in --reference NAME=MODEL"
        )
    return f"losses/{name}"


def capacity(array: ArraySpec, shard_rows: int, k: int) -> int:
    """Returns how many values of an array fit in one shard.

    Args:
        array: The array.
        shard_rows: Number of rows that a shard has room for.
        k: Number of entries that a row has room for; 1 for layers other than `target`.
    """
    return shard_rows * k if array.per == "entry" else shard_rows


@functools.lru_cache
def chunk_length(array: ArraySpec, shard_rows: int, k: int) -> int:
    """Returns the number of values in one inner chunk of an array. This number divides the array's `capacity` evenly.

    Args:
        array: The array.
        shard_rows: Number of rows that a shard has room for.
        k: Number of entries that a row has room for; 1 for layers other than `target`.
    """
    row_chunk = min(shard_rows, ROW_CHUNK)
    if array.per != "entry":
        return row_chunk
    # Zarr requires chunks that divide a shard evenly. The result is the largest multiple of `row_chunk` that divides
    # the shard evenly and is at most ENTRY_CHUNK.
    num, most = shard_rows // row_chunk * k, ENTRY_CHUNK // row_chunk
    return row_chunk * max(m for m in range(1, most + 1) if num % m == 0)


def object_path(layer: str, array: ArraySpec, shard: int) -> str:
    """Returns the Zarr key of the object that holds one shard of an array, relative to the store's root."""
    return f"{layer}/{array.name}/c/{shard}"
