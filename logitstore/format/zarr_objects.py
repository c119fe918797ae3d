"""Encodes and decodes Zarr objects, each of which holds one shard of one array. Pure functions, no I/O.

The zarr package encodes the objects. This module decodes them itself, because an object may come from an untrusted
source. Whatever the headers in an object claim, decoding must not allocate more memory than the values of one shard
need.
"""

from __future__ import annotations

import functools
import json
import struct
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np
import zarr
from numcodecs import blosc
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec
from zarr.storage import MemoryStore

from logitstore.format.layout import ArraySpec, capacity, chunk_length

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOSC_HEADER = struct.Struct("<BBBBIII")
"""Header of a Blosc chunk: version of Blosc, version of its zstd format, flags and typesize, followed by three sizes in
bytes (of the uncompressed values, of an uncompressed block, and of the whole chunk)."""
BLOSC_VERSIONS = (2, 1)
"""Versions of Blosc and of its zstd format in the header of every chunk of a store."""
BLOSC_FLAGS = 0b1001_0001
"""Flags that every chunk of a store has: zstd, blocks not split, byte shuffle."""
BLOSC_STORED = 0b10
"""Flag of a chunk whose values are stored uncompressed, because compression does not make them smaller."""
INDEX_ENTRY = np.dtype([("offset", "<u8"), ("bytes", "<u8")])
"""Entry of the index of an object: offset of an inner chunk in the object, and size of that chunk, both in bytes."""
MIN_BLOCK_BYTES = 2**13
"""Minimum size in bytes of a Blosc block in a chunk that has several blocks. The current version of Blosc makes only
one block per chunk."""
ABSENT = 2**64 - 1
"""If an inner chunk is not stored, both fields of the chunk's index entry have this value."""
CHECKSUM_BYTES = 4
"""Size in bytes of a crc32c. Each inner chunk and the index are followed by a crc32c."""


def group_metadata(attributes: dict[str, Any]) -> bytes:
    """Returns the content of a group's zarr.json.

    Args:
        attributes: Attributes of the group, as JSON values.
    """
    # zarr writes into a dictionary in memory, from which the content is taken.
    objects: dict[str, Any] = {}
    zarr.create_group(MemoryStore(objects), zarr_format=3, attributes=attributes)
    return bytes(objects["zarr.json"].to_bytes())


@functools.lru_cache
def array_metadata(array: ArraySpec, *, num_shards: int, shard_rows: int, k: int) -> bytes:
    """Returns the content of an array's zarr.json.

    Args:
        array: The array.
        num_shards: Number of shards in the array's shape.
        shard_rows: Number of rows that a shard has room for.
        k: Number of entries that a row has room for; 1 for layers other than `target`.
    """
    objects: dict[str, Any] = {}
    _create(objects, array, num_shards=num_shards, shard_rows=shard_rows, k=k)
    return bytes(objects["zarr.json"].to_bytes())


METADATA = (
    "zarr_format", "node_type", "shape", "data_type", "chunk_grid", "chunk_key_encoding", "fill_value", "codecs",
)  # fmt: skip
"""Fields of an array's zarr.json that determine how stored bytes become values."""


def same_metadata(found: object, expected: bytes) -> bool:
    """Returns whether a stored zarr.json agrees with the expected one in all fields that affect the values.

    Args:
        found: Parsed content of the stored zarr.json.
        expected: Expected content, from `array_metadata`.
    """
    wanted = json.loads(expected)
    return isinstance(found, dict) and all(found.get(name) == wanted[name] for name in METADATA)


def num_shards_of(found: object, array: ArraySpec, *, shard_rows: int, k: int) -> int:
    """Returns the number of shards that the shape in a stored zarr.json covers; 0 if the file describes another array.

    Args:
        found: Parsed content of the stored zarr.json.
        array: The array that the zarr.json should describe.
        shard_rows: Number of rows that a shard has room for.
        k: Number of entries that a row has room for; 1 for layers other than `target`.
    """
    shape = found.get("shape") if isinstance(found, dict) else None
    room = capacity(array, shard_rows, k)
    # isinstance would accept JSON's true as an int, so the type of the size is compared exactly.
    if not isinstance(shape, list) or len(shape) != 1 or type(shape[0]) is not int or not 0 < shape[0] < 2**63:
        return 0
    # A shape that is not a whole number of shards differs from the wanted shape. The result is then 0 too.
    num_shards = shape[0] // room
    wanted = array_metadata(array, num_shards=num_shards, shard_rows=shard_rows, k=k)
    return num_shards if same_metadata(found, wanted) else 0


def encode(values: NDArray[Any], array: ArraySpec, *, shard_rows: int, k: int) -> bytes | None:
    """Encodes the values of one shard of an array.

    Args:
        values: The values, at most as many as the shard has room for.
        array: The array.
        shard_rows: Number of rows that a shard has room for.
        k: Number of entries that a row has room for; 1 for layers other than `target`.

    Returns:
        The bytes of the object; None if all values equal the fill value, because Zarr stores no object then.
    """
    objects: dict[str, Any] = {}
    # Zarr encodes whole shards only. Places beyond the values keep the fill value. The object of a shard does not
    # depend on the number of shards, so an array of one shard is enough.
    whole = np.full(capacity(array, shard_rows, k), array.fill, dtype=array.dtype)
    whole[: len(values)] = values
    _create(objects, array, num_shards=1, shard_rows=shard_rows, k=k)[:] = whole
    return bytes(objects["c/0"].to_bytes()) if "c/0" in objects else None


def most_bytes(array: ArraySpec, *, shard_rows: int, k: int) -> int:
    """Returns the maximum size in bytes of an object of an array.

    An object has this size if its shard is full and all values are stored uncompressed. Headers, checksums and the
    index are included.

    Args:
        array: The array.
        shard_rows: Number of rows that a shard has room for.
        k: Number of entries that a row has room for; 1 for layers other than `target`.
    """
    room = capacity(array, shard_rows, k)
    chunks = room // chunk_length(array, shard_rows, k)
    overhead = chunks * (BLOSC_HEADER.size + CHECKSUM_BYTES)
    return room * np.dtype(array.dtype).itemsize + overhead + index_bytes(array, shard_rows=shard_rows, k=k)


def index_bytes(array: ArraySpec, *, shard_rows: int, k: int) -> int:
    """Returns the size in bytes of the index of an object. All objects of an array have an index of the same size.

    Args:
        array: The array.
        shard_rows: Number of rows that a shard has room for.
        k: Number of entries that a row has room for; 1 for layers other than `target`.
    """
    chunks = capacity(array, shard_rows, k) // chunk_length(array, shard_rows, k)
    return chunks * INDEX_ENTRY.itemsize + CHECKSUM_BYTES


def decode(data: bytes | None, num: int, array: ArraySpec, *, shard_rows: int, k: int) -> NDArray[Any]:
    """Decodes the object of one shard of an array.

    Args:
        data: The bytes of the object. None if the object does not exist: all values are then the fill value.
        num: Number of values in the shard, at most as many as the shard has room for.
        array: The array.
        shard_rows: Number of rows that a shard has room for.
        k: Number of entries that a row has room for; 1 for layers other than `target`.

    Returns:
        The first `num` values.

    Raises:
        ValueError: The object is malformed or too large, holds more than `num` values, or holds a wrong checksum.
    """
    dtype, length = np.dtype(array.dtype), chunk_length(array, shard_rows, k)
    if data is None:
        return np.full(num, array.fill, dtype=dtype)
    if len(data) > most_bytes(array, shard_rows=shard_rows, k=k):
        raise ValueError("the object is larger than a full shard of this array")
    index = _read_index(data, capacity(array, shard_rows, k) // length, length * dtype.itemsize)
    # Only the chunks that hold the first `num` values are decompressed, so the memory does not depend on the object.
    used = -(-num // length)
    values = np.empty(used * length, dtype=dtype)
    for i, (offset, size) in enumerate(index[:used].tolist()):
        part = values[i * length : (i + 1) * length]
        if size == ABSENT:
            part[:] = array.fill
            continue
        chunk = _without_checksum(data[offset : offset + size], f"chunk {i}")
        _check_header(chunk, part, i)
        try:
            blosc.decompress(chunk, part)
        except RuntimeError as error:
            raise ValueError(f"chunk {i} cannot be decompressed ({error})") from error
    # The checksum in the commit record covers only the first `num` values, so further values must be detected here.
    # Bytes are compared, because NaN is not equal to NaN.
    unused = np.full_like(values[num:], array.fill)
    if (index[used:]["bytes"] != ABSENT).any() or not np.array_equal(values[num:].view("u1"), unused.view("u1")):
        raise ValueError(f"the object holds more than {num} values")
    return values[:num]


def _create(objects: dict[str, Any], array: ArraySpec, *, num_shards: int, shard_rows: int, k: int) -> Any:  # noqa: ANN401
    dtype, room = np.dtype(array.dtype), capacity(array, shard_rows, k)
    return zarr.create_array(
        MemoryStore(objects),
        shape=(num_shards * room,),
        dtype=dtype,
        chunks=(chunk_length(array, shard_rows, k),),
        shards=(room,),
        # Values of one byte have no byte order.
        serializer=BytesCodec(endian="little") if dtype.itemsize > 1 else BytesCodec(),
        compressors=[BloscCodec(cname="zstd", clevel=5, shuffle="shuffle", typesize=dtype.itemsize), Crc32cCodec()],
        fill_value=array.fill,
        zarr_format=3,
    )


def _check_header(chunk: bytes, values: NDArray[Any], i: int) -> None:
    """Checks that a chunk has a header that this package could have written.

    Blosc trusts the header. Blosc would accept other compressors, and also thousands of blocks that all share the same
    bytes, which would take hours to decompress. A valid chunk has one block, or several blocks of at least
    `MIN_BLOCK_BYTES` each.
    """
    *versions, flags, typesize, values_bytes, block_bytes, num_bytes = BLOSC_HEADER.unpack_from(chunk)
    if tuple(versions) != BLOSC_VERSIONS or flags & ~BLOSC_STORED != BLOSC_FLAGS or typesize != values.itemsize:
        raise ValueError(f"chunk {i} has the unexpected Blosc header {chunk[:4].hex()}")
    least = min(values.nbytes, MIN_BLOCK_BYTES)
    if values_bytes != values.nbytes or not least <= block_bytes <= values.nbytes or num_bytes != len(chunk):
        raise ValueError(
            f"the Blosc header of chunk {i} must state {values.nbytes} bytes of values, blocks of at least {least} "
            f"bytes and a chunk of {len(chunk)} bytes, got {values_bytes}, {block_bytes} and {num_bytes}"
        )


def _read_index(data: bytes, num_chunks: int, chunk_bytes: int) -> NDArray[Any]:
    """Reads the index of an object: the offset and size in bytes of each inner chunk.

    Raises:
        ValueError: The index is damaged, or its chunks overlap, lie outside the object or have impossible sizes.
    """
    size = num_chunks * INDEX_ENTRY.itemsize + CHECKSUM_BYTES
    if len(data) < size:
        raise ValueError(f"the object has {len(data)} bytes, fewer than its index of {size} bytes")
    # The index is at the end of the object.
    index = np.frombuffer(_without_checksum(data[-size:], "the index"), INDEX_ENTRY)
    there = index[(index["offset"] != ABSENT) | (index["bytes"] != ABSENT)]
    overhead = BLOSC_HEADER.size + CHECKSUM_BYTES
    if ((there["bytes"] < overhead) | (there["bytes"] > min(chunk_bytes + overhead, len(data) - size))).any():
        raise ValueError("the index has chunks of impossible sizes")
    # The sum of `offset` and `bytes` could overflow 64 bits, so `bytes` is subtracted from the bound instead.
    if (there["offset"] > len(data) - size - there["bytes"]).any():
        raise ValueError("the index has chunks beyond the end of the object")
    # If chunks could share bytes, a small object could take as much time and memory as a large one.
    there = there[np.argsort(there["offset"])]
    if (there["offset"][1:] < there["offset"][:-1] + there["bytes"][:-1]).any():
        raise ValueError("the index has chunks that overlap")
    return index


def _without_checksum(data: bytes, what: str) -> bytes:
    """Returns `data` without the crc32c at its end. Raises a ValueError that names `what` if the crc32c is wrong."""
    body, found = data[:-CHECKSUM_BYTES], int.from_bytes(data[-CHECKSUM_BYTES:], "little")
    if google_crc32c.value(body) != found:
        raise ValueError(f"the checksum of {what} differs")
    return body
