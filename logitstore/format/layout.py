"""Which arrays each layer has, their types and shapes, and their place in the Zarr hierarchy (docs/format.md)."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

from logitstore.format.spec import ROW_CHUNK

ENTRY_CHUNK = 2**16
"""At most this many entries are in one inner chunk of a flat array."""

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""What a losses layer may be called: it becomes a folder's name."""


@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """One array of a layer."""

    name: str
    dtype: str
    per: Literal["row", "document", "entry"]
    """What its values are numbered by. A shard has room for shard_rows rows or documents, or shard_rows * k entries."""
    fill: float
    """What unwritten places read as."""


TOKENS = (
    ArraySpec(name="ids", dtype="<u4", per="row", fill=0),
    ArraySpec(name="loss_mask", dtype="|u1", per="row", fill=0),
    ArraySpec(name="lengths", dtype="<u4", per="document", fill=0),
    ArraySpec(name="digests", dtype="<u8", per="document", fill=0),
)
TARGET = (
    ArraySpec(name="counts", dtype="<u2", per="row", fill=0),
    ArraySpec(name="gaps", dtype="<u4", per="entry", fill=0),
    ArraySpec(name="logprobs", dtype="|u1", per="entry", fill=0),
    ArraySpec(name="draws", dtype="<u2", per="entry", fill=0),
    ArraySpec(name="tail", dtype="<f4", per="row", fill=np.nan),
    ArraySpec(name="label_logprob", dtype="<f4", per="row", fill=np.nan),
    ArraySpec(name="entropy", dtype="<f4", per="row", fill=np.nan),
)
LOSSES = (
    ArraySpec(name="ce", dtype="<f4", per="row", fill=np.nan),
    ArraySpec(name="label_logprob", dtype="<f4", per="row", fill=np.nan),
)


def layer_arrays(layer: str) -> tuple[ArraySpec, ...]:
    """Returns the arrays of `tokens`, `target` or `losses/<name>`.

    Raises:
        ValueError: There cannot be such a layer. Whoever reads or writes one asks for its arrays first: no other name
            becomes a path.
    """
    if layer in ("tokens", "target"):
        return TOKENS if layer == "tokens" else TARGET
    if layer != losses_layer(layer.removeprefix("losses/")):
        raise ValueError(f"layer must be tokens, target or losses/NAME, got layer={layer!r:.80}")
    return LOSSES


def below(layer: str) -> str | None:
    """Returns the layer that a layer is computed from, None for tokens."""
    return {"tokens": None, "target": "tokens"}.get(layer, "target")


def is_loss_name(name: str) -> bool:
    """Returns whether a losses layer may be called so."""
    return NAME_PATTERN.fullmatch(name) is not None and not name.endswith(".json")


def losses_layer(name: str) -> str:
    """Returns the layer that holds the losses of a named model.

    Raises:
        ValueError: The name cannot be a folder's.
    """
    if not is_loss_name(name):
        raise ValueError(
            "reference name must be letters, digits, dots, dashes or underscores and not end in .json, "
            f"got name={name!r:.80}; give --reference NAME=MODEL with such a NAME"
        )
    return f"losses/{name}"


def capacity(array: ArraySpec, shard_rows: int, k: int) -> int:
    """Returns how many values of an array one shard has room for."""
    return shard_rows * k if array.per == "entry" else shard_rows


@functools.lru_cache
def chunk_length(array: ArraySpec, shard_rows: int, k: int) -> int:
    """Returns how many values one inner chunk of an array holds; a shard's room is a multiple of it."""
    row_chunk = min(shard_rows, ROW_CHUNK)
    if array.per != "entry":
        return row_chunk
    num, most = shard_rows // row_chunk * k, ENTRY_CHUNK // row_chunk
    return row_chunk * max(m for m in range(1, most + 1) if num % m == 0)


def object_path(layer: str, array: ArraySpec, shard: int) -> str:
    """Returns the Zarr key of a shard of an array."""
    return f"{layer}/{array.name}/c/{shard}"
