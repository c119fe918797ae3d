"""Which arrays each layer has, their types and shapes, and their place in the Zarr hierarchy (docs/format.md)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec

from logitstore.spec import ROW_CHUNK

if TYPE_CHECKING:
    import zarr
    from numpy.typing import NDArray

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
)
TARGET = (
    ArraySpec(name="counts", dtype="<u2", per="row", fill=0),
    ArraySpec(name="token_ids", dtype="<u4", per="entry", fill=0),
    ArraySpec(name="logprobs", dtype="|u1", per="entry", fill=0),
    ArraySpec(name="tail", dtype="<f4", per="row", fill=np.nan),
    ArraySpec(name="label_logprob", dtype="<f4", per="row", fill=np.nan),
    ArraySpec(name="entropy", dtype="<f4", per="row", fill=np.nan),
)
LOSSES = (
    ArraySpec(name="ce", dtype="<f4", per="row", fill=np.nan),
    ArraySpec(name="label_logprob", dtype="<f4", per="row", fill=np.nan),
)


def layer_arrays(layer: str) -> tuple[ArraySpec, ...]:
    """Returns the arrays of `tokens`, `target` or `losses/<name>`."""
    return {"tokens": TOKENS, "target": TARGET}.get(layer, LOSSES)


def losses_layer(name: str) -> str:
    """Returns the layer that holds the losses of a named model.

    Raises:
        ValueError: The name cannot be a folder's.
    """
    if not NAME_PATTERN.fullmatch(name) or name.endswith(".json"):
        raise ValueError(
            "reference name must be letters, digits, dots, dashes or underscores and not end in .json, "
            f"got name={name!r:.80}; give --reference NAME=MODEL with such a NAME"
        )
    return f"losses/{name}"


def capacity(array: ArraySpec, shard_rows: int, k: int) -> int:
    """Returns how many values of an array one shard has room for."""
    return shard_rows * k if array.per == "entry" else shard_rows


def create_arrays(group: zarr.Group, layer: str, *, num_shards: int, shard_rows: int, k: int) -> None:
    """Creates the empty arrays of a layer; an array that is there already stays."""
    row_chunk = min(shard_rows, ROW_CHUNK)
    per_chunk = max(m for m in range(1, k + 1) if k % m == 0 and (m == 1 or row_chunk * m <= ENTRY_CHUNK))
    for array in layer_arrays(layer):
        if array.name in group:
            continue
        room = capacity(array, shard_rows, k)
        dtype = np.dtype(array.dtype)
        group.create_array(
            array.name,
            shape=(num_shards * room,),
            dtype=dtype,
            chunks=(row_chunk * per_chunk if array.per == "entry" else row_chunk,),
            shards=(room,),
            serializer=BytesCodec(endian="little") if dtype.itemsize > 1 else BytesCodec(),
            compressors=[
                BloscCodec(cname="zstd", clevel=5, shuffle="shuffle", typesize=dtype.itemsize),
                Crc32cCodec(),
            ],
            fill_value=array.fill,
        )


def shard_span(array: ArraySpec, shard: int, shard_rows: int, k: int) -> slice:
    """Returns where in the whole array a shard lies."""
    room = capacity(array, shard_rows, k)
    return slice(shard * room, (shard + 1) * room)


def padded(values: NDArray[Any], array: ArraySpec, room: int) -> NDArray[Any]:
    """Extends values to a whole shard with the fill value: whole shards are written without reading first."""
    whole = np.full(room, array.fill, dtype=array.dtype)
    whole[: len(values)] = values
    return whole
