"""The bytes of one shard of one array, as they lie at its Zarr key. Pure functions, no I/O.

Zarr encodes. Decoding is done here, on what zarr wrote: an object comes from somewhere else, and must not be able to
ask for more memory than its shard has room for, whatever its headers say.
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
"""Versions of Blosc and of its zstd format, flags, typesize, bytes of the values, of a block, and of it all."""
BLOSC_VERSIONS = (2, 1)
BLOSC_FLAGS = 0b1001_0001
"""zstd, blocks not split, byte shuffle."""
BLOSC_STORED = 0b10
"""The flag that may come with them: stored as is, because it does not get smaller."""
INDEX_ENTRY = np.dtype([("offset", "<u8"), ("bytes", "<u8")])
MIN_BLOCK_BYTES = 2**13
"""Of a chunk that has several blocks. Blosc as it is installed today makes one block of each chunk of ours."""
ABSENT = 2**64 - 1
CHECKSUM_BYTES = 4


def group_metadata(attributes: dict[str, Any]) -> bytes:
    """Returns the zarr.json of a group."""
    held: dict[str, Any] = {}
    zarr.create_group(MemoryStore(held), zarr_format=3, attributes=attributes)
    return bytes(held["zarr.json"].to_bytes())


@functools.lru_cache
def array_metadata(array: ArraySpec, *, num_shards: int, shard_rows: int, k: int) -> bytes:
    """Returns the zarr.json of an array."""
    held: dict[str, Any] = {}
    _create(held, array, num_shards=num_shards, shard_rows=shard_rows, k=k)
    return bytes(held["zarr.json"].to_bytes())


METADATA = (
    "zarr_format", "node_type", "shape", "data_type", "chunk_grid", "chunk_key_encoding", "fill_value", "codecs",
)  # fmt: skip
"""What of an array's metadata says how its bytes become values."""


def same_metadata(found: object, expected: bytes) -> bool:
    """Compares a stored zarr.json with the expected one, but for what does not change the values."""
    wanted = json.loads(expected)
    return isinstance(found, dict) and all(found.get(name) == wanted[name] for name in METADATA)


def num_shards_of(found: object, array: ArraySpec, *, shard_rows: int, k: int) -> int:
    """Returns for how many shards a stored zarr.json has room; 0 if it is not this array's."""
    shape = found.get("shape") if isinstance(found, dict) else None
    room = capacity(array, shard_rows, k)
    if not isinstance(shape, list) or len(shape) != 1 or type(shape[0]) is not int or not 0 < shape[0] < 2**63:
        return 0
    num_shards = shape[0] // room
    wanted = array_metadata(array, num_shards=num_shards, shard_rows=shard_rows, k=k)
    return num_shards if same_metadata(found, wanted) else 0


def encode(values: NDArray[Any], array: ArraySpec, *, shard_rows: int, k: int) -> bytes | None:
    """Returns the object that holds one shard's values, None where nothing differs from the fill value.

    Args:
        values: At most as many as the shard has room for.
        array: Of which array.
        shard_rows: Rows that a shard has room for.
        k: Entries that a row has room for; 1 for layers other than `target`.
    """
    held: dict[str, Any] = {}
    whole = np.full(capacity(array, shard_rows, k), array.fill, dtype=array.dtype)
    whole[: len(values)] = values
    _create(held, array, num_shards=1, shard_rows=shard_rows, k=k)[:] = whole
    return bytes(held["c/0"].to_bytes()) if "c/0" in held else None


def most_bytes(array: ArraySpec, *, shard_rows: int, k: int) -> int:
    """Returns the most bytes that an object of an array can have: stored as is, with all headers and the index."""
    room = capacity(array, shard_rows, k)
    chunks = room // chunk_length(array, shard_rows, k)
    overhead = chunks * (BLOSC_HEADER.size + CHECKSUM_BYTES)
    return room * np.dtype(array.dtype).itemsize + overhead + index_bytes(array, shard_rows=shard_rows, k=k)


def index_bytes(array: ArraySpec, *, shard_rows: int, k: int) -> int:
    """Returns the bytes of the index in each object of an array, however few values there are."""
    chunks = capacity(array, shard_rows, k) // chunk_length(array, shard_rows, k)
    return chunks * INDEX_ENTRY.itemsize + CHECKSUM_BYTES


def decode(data: bytes | None, num: int, array: ArraySpec, *, shard_rows: int, k: int) -> NDArray[Any]:
    """Returns the first `num` values of a shard from its object.

    Args:
        data: The object, None where there is none.
        num: How many values, at most as many as the shard has room for.
        array: Of which array.
        shard_rows: Rows that a shard has room for.
        k: Entries that a row has room for; 1 for layers other than `target`.

    Raises:
        ValueError: The object is not one of such a shard, or a checksum in it does not hold.
    """
    dtype, length = np.dtype(array.dtype), chunk_length(array, shard_rows, k)
    if data is None:
        return np.full(num, array.fill, dtype=dtype)
    if len(data) > most_bytes(array, shard_rows=shard_rows, k=k):
        raise ValueError("more bytes than there is room for")
    index = _index(data, capacity(array, shard_rows, k) // length, length * dtype.itemsize)
    used = -(-num // length)
    values = np.empty(used * length, dtype=dtype)
    for i, (offset, size) in enumerate(index[:used].tolist()):
        part = values[i * length : (i + 1) * length]
        if size == ABSENT:
            part[:] = array.fill
            continue
        chunk = _checked(data[offset : offset + size], f"chunk {i}")
        _check_header(chunk, part, i)
        try:
            blosc.decompress(chunk, part)
        except RuntimeError as error:
            raise ValueError(f"chunk {i} that cannot be decompressed ({error})") from error
    # The first values of a longer shard may be the same as those of this one.
    unused = np.full_like(values[num:], array.fill)
    if (index[used:]["bytes"] != ABSENT).any() or not np.array_equal(values[num:].view("u1"), unused.view("u1")):
        raise ValueError(f"more than {num} values")
    return values[:num]


def _create(held: dict[str, Any], array: ArraySpec, *, num_shards: int, shard_rows: int, k: int) -> Any:  # noqa: ANN401
    dtype, room = np.dtype(array.dtype), capacity(array, shard_rows, k)
    return zarr.create_array(
        MemoryStore(held),
        shape=(num_shards * room,),
        dtype=dtype,
        chunks=(chunk_length(array, shard_rows, k),),
        shards=(room,),
        serializer=BytesCodec(endian="little") if dtype.itemsize > 1 else BytesCodec(),
        compressors=[BloscCodec(cname="zstd", clevel=5, shuffle="shuffle", typesize=dtype.itemsize), Crc32cCodec()],
        fill_value=array.fill,
        zarr_format=3,
    )


def _check_header(chunk: bytes, values: NDArray[Any], i: int) -> None:
    """Checks that a chunk is one that this package writes.

    Blosc trusts its header, and would also take other compressors, and thousands of blocks that all lie in the same
    bytes: hours of work in one chunk. Here a chunk is one block, or a few that are not small.
    """
    *versions, flags, typesize, values_bytes, block_bytes, num_bytes = BLOSC_HEADER.unpack_from(chunk)
    if tuple(versions) != BLOSC_VERSIONS or flags & ~BLOSC_STORED != BLOSC_FLAGS or typesize != values.itemsize:
        raise ValueError(f"chunk {i} with Blosc header {chunk[:4].hex()}")
    least = min(values.nbytes, MIN_BLOCK_BYTES)
    if values_bytes != values.nbytes or not least <= block_bytes <= values.nbytes or num_bytes != len(chunk):
        raise ValueError(f"chunk {i} for {values_bytes} bytes, not {values.nbytes}")


def _index(data: bytes, num_chunks: int, chunk_bytes: int) -> NDArray[Any]:
    """Reads where each inner chunk lies, from the end of the object. Chunks lie in it, and apart from each other."""
    size = num_chunks * INDEX_ENTRY.itemsize + CHECKSUM_BYTES
    if len(data) < size:
        raise ValueError(f"{len(data)} bytes, less than its index of {size}")
    index = np.frombuffer(_checked(data[-size:], "index"), INDEX_ENTRY)
    there = index[(index["offset"] != ABSENT) | (index["bytes"] != ABSENT)]
    overhead = BLOSC_HEADER.size + CHECKSUM_BYTES
    if ((there["bytes"] < overhead) | (there["bytes"] > min(chunk_bytes + overhead, len(data) - size))).any():
        raise ValueError("an index with chunks of impossible sizes")
    if (there["offset"] > len(data) - size - there["bytes"]).any():
        raise ValueError("an index with chunks beyond its end")
    there = there[np.argsort(there["offset"])]
    if (there["offset"][1:] < there["offset"][:-1] + there["bytes"][:-1]).any():
        raise ValueError("an index with chunks that overlap")
    return index


def _checked(data: bytes, what: str) -> bytes:
    """Takes the checksum off the end of some bytes, if it is theirs."""
    body, found = data[:-CHECKSUM_BYTES], int.from_bytes(data[-CHECKSUM_BYTES:], "little")
    if google_crc32c.value(body) != found:
        raise ValueError(f"{what} with another checksum")
    return body
