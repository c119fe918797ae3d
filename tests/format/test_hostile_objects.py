"""Hostile stores: false objects with valid checksums. See helpers/hostile.py."""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path

import numpy as np
import pytest
from numcodecs import blosc

from logitstore.format import layout, zarr_objects
from logitstore.rows.tokens import encode_tokens
from tests.helpers import stores
from tests.helpers.hostile import check, damaged, refused


@pytest.fixture
def url(small_store, tmp_path):
    """A copy of a valid store, which the test makes invalid."""
    return stores.copy(small_store, tmp_path / "cache.zarr")


def sparse(path, size, begin, end):
    """Replaces a file by a sparse file of `size` bytes, which takes almost no space on the disk."""
    path.unlink()
    with path.open("xb") as file:
        file.write(begin)
        file.truncate(size)
        file.seek(size - len(end))
        file.write(end)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("zarr.json", refused("at most 4194304 bytes")),
        ("target/zarr.json", refused("at most 4194304 bytes")),
        ("losses/ref/zarr.json", refused("at most 4194304 bytes")),
        ("tokens/ids/zarr.json", {"open": "", "shard 1": ""}),
        ("commits/tokens", damaged("a commit record that is too long")),
        ("commits/target", damaged("a commit record that is too long")),
        ("tokens/ids/c/1", damaged("larger than a full shard")),
        ("target/gaps/c/1", damaged("larger than a full shard")),
    ],
)
@pytest.mark.parametrize("size", [100_000_000, 2**42])
def test_file_longer_than_its_maximum_is_not_read(reader, url, path, expected, size):
    file = Path(url, path)
    if file.is_dir():
        file = stores.record(url, path.partition("/")[2], 1)
    data = file.read_bytes()
    # JSON followed by spaces, or an object whose index is at its end
    sparse(file, size, data + b" " * 5_000_000 if file.suffix == ".json" else b"", data)
    check(reader, url, expected)


# Objects: the bytes of a shard of an array, with valid checksums


@pytest.mark.parametrize(("shard_rows", "k"), [(2, 1), (3, 5), (8, 3), (127, 1), (2**14, 3), (2**15, 5), (2**14, 64)])
def test_encoded_values_are_decoded_unchanged(shard_rows, k):
    """The checks against false chunks accept valid chunks of every size, compressible or not."""
    rng = np.random.default_rng(0)
    for array in (*layout.TOKENS, *layout.TARGET):
        room = layout.capacity(array, shard_rows, k)
        for values in (
            rng.integers(0, 256, room),
            rng.integers(0, 2, room),
            np.full(room, 7),
            np.full(room, array.fill),
        ):
            for num in {1, room // 3, room}:
                used = values[:num].astype(array.dtype)
                data = zarr_objects.encode(used, array, shard_rows=shard_rows, k=k)
                assert data is None or len(data) <= zarr_objects.most_bytes(array, shard_rows=shard_rows, k=k)
                found = zarr_objects.decode(data, num, array, shard_rows=shard_rows, k=k)
                np.testing.assert_array_equal(found, used)


def object_of(url, layer="target", name="gaps", shard=1):
    path = Path(url, layer, name, "c", str(shard))
    return path, stores.Object.of(path.read_bytes(), stores.num_chunks(stores.array_of(layer, name)))


def header(*, versions=(2, 1), flags=0x91, typesize=4, values=1024, block=1024, size=None, payload=b""):
    """Returns a Blosc chunk for the gaps of a shard: 256 values of 4 bytes."""
    size = 16 + len(payload) if size is None else size
    return struct.pack("<BBBBIII", *versions, flags, typesize, values, block, size) + payload


def zstd(data):
    """Returns the payload of a Blosc chunk with one block: its offset, its length, and the zstd frame."""
    chunk = blosc.compress(np.frombuffer(data, "u1"), b"zstd", 5, blosc.NOSHUFFLE, typesize=1)
    return chunk[16:]


CHUNKS = {
    "claims gigabytes": header(values=2**31 - 1, block=2**31 - 1, payload=bytes(64)),
    "claims 4 gigabytes": header(values=2**32 - 1, block=2**32 - 1, payload=bytes(64)),
    "claims nothing": header(values=0, block=0, payload=bytes(64)),
    "block 0": header(block=0, payload=bytes(64)),
    "block 1": header(block=1, payload=struct.pack("<I", 20) * 1024),
    "block larger": header(block=2**30, payload=bytes(64)),
    "block negative": header(block=2**32 - 4, payload=bytes(64)),
    "typesize 0": header(typesize=0, payload=bytes(64)),
    "typesize 255": header(typesize=255, payload=bytes(64)),
    "typesize 1": header(typesize=1, payload=bytes(64)),
    "shorter than it says": header(size=2**31, payload=bytes(64)),
    "longer than it says": header(size=20, payload=bytes(64)),
    "no payload": header(),
    "another Blosc": header(versions=(3, 1), payload=bytes(64)),
    "another zstd": header(versions=(2, 9), payload=bytes(64)),
    "blosclz": header(flags=0x11, payload=struct.pack("<II", 20, 8) + bytes(range(8))),
    "lz4": header(flags=0x31, payload=struct.pack("<II", 20, 8) + b"\xff" * 40),
    "zlib": header(flags=0x71, payload=struct.pack("<II", 20, 8) + bytes(40)),
    "unknown codec": header(flags=0xF1, payload=bytes(64)),
    "flags of the future": header(flags=0x99, payload=bytes(64)),
    "bit shuffle": header(flags=0x94, payload=struct.pack("<II", 20, 8) + bytes(64)),
    "split": header(flags=0x81, payload=struct.pack("<II", 20, 8) + bytes(64)),
    "stored but shorter": header(flags=0x93, payload=bytes(64)),
    "stored but longer": header(flags=0x93, payload=bytes(1024 + 4)),
    "block beyond the end": header(payload=struct.pack("<I", 2**31 - 1) + bytes(60)),
    "block before the beginning": header(payload=struct.pack("<i", -1000) + bytes(60)),
    "block in the header": header(payload=struct.pack("<I", 0) + bytes(60)),
    "block at the end": header(payload=struct.pack("<I", 16 + 62) + bytes(60)),
    "block longer than is left": header(payload=struct.pack("<II", 20, 2**31 - 1) + bytes(56)),
    "block of negative length": header(payload=struct.pack("<Ii", 20, -5) + bytes(56)),
    "no zstd": header(payload=struct.pack("<II", 20, 56) + b"\x28\xb5\x2f\xfd" + b"\xff" * 52),
    "zstd of gigabytes": header(payload=zstd(bytes(2**28))),
    "zstd of too little": header(payload=zstd(bytes(100))),
    "zstd with a dictionary": header(
        payload=struct.pack("<II", 20, 12) + bytes.fromhex("28b52ffd03") + b"\xff" * 4 + b"\1\0\0"
    ),
    "zstd with a window of terabytes": header(
        payload=struct.pack("<II", 20, 10) + bytes.fromhex("28b52ffd00ff") + b"\1\0\0\0"
    ),
}


@pytest.mark.parametrize("case", CHUNKS)
def test_chunk_with_a_false_header_is_damage(reader, url, case):
    path, _ = object_of(url)
    stores.replace(path, stores.one_chunk(CHUNKS[case]))
    check(reader, url, damaged("gaps that cannot be decoded"))


def index_of(*entries):
    def change(found):
        found.index = [list(entry) for entry in entries]

    return change


ABSENT = 2**64 - 1
INDEXES = {
    "beyond the end": index_of((10**6, 100)),
    "far beyond the end": index_of((2**63, 100)),
    "wraps around": index_of((ABSENT - 50, 60)),
    "into the index": index_of((0, 10**4)),
    "gigabytes": index_of((0, 2**40)),
    "absent with a size": index_of((ABSENT, 100)),
    "absent but for its offset": index_of((0, ABSENT)),
    "size 0": index_of((0, 0)),
    "size of a negative number": index_of((0, 2**64 - 100)),
    "less than a header": index_of((0, 19)),
    "absent": index_of((ABSENT, ABSENT)),
    "all is index": lambda found: (found.body.clear(), index_of((0, 20))(found)),
}


@pytest.mark.parametrize("case", INDEXES)
def test_false_index_is_damage(reader, url, case):
    path, found = object_of(url)
    INDEXES[case](found)
    stores.replace(path, found.to_bytes())
    message = "gaps with checksum" if case == "absent" else "gaps that cannot be decoded"
    check(reader, url, damaged(message))


@pytest.mark.parametrize("size", [0, 1, 4, 19, 20, 21])
def test_an_object_shorter_than_its_index_is_damage(reader, url, size):
    path, _ = object_of(url)
    stores.replace(path, bytes(size))
    check(reader, url, damaged("gaps that cannot be decoded"))


SAME = {
    "twice": ([[0, 2**18 + 20]] * 128, "overlap"),
    "shifted": ([[16 * i, 2**17] for i in range(128)], "overlap"),
    "by a byte": ([[0, 1000], [999, 1000]], "overlap"),
    "too large": ([[0, 2**18 + 21]], "impossible sizes"),
}


@pytest.mark.parametrize("case", SAME)
def test_overlapping_chunks_are_damage(case):
    """Otherwise one megabyte could be decompressed thousands of times."""
    entries, message = SAME[case]
    array = stores.array_of("target", "gaps")
    assert stores.num_chunks(array, 2**17, 64) == 128
    found = stores.Object(bytearray(2**19), entries + [[ABSENT, ABSENT]] * (128 - len(entries)))
    with pytest.raises(ValueError, match=message):
        zarr_objects.decode(found.to_bytes(), 2**23, array, shard_rows=2**17, k=64)


def test_overlapping_blocks_of_a_chunk_are_damage():
    """Blosc would decompress the same bytes for each of 16,384 blocks of a 128 KB chunk, which takes a CPU an hour."""

    array = stores.array_of("target", "gaps")
    empty = bytes.fromhex("28b52ffd2000010000")
    payload = struct.pack("<I", 16 + 4 * 2**12) * 2**12 + struct.pack("<i", 9 * 4000) + empty * 4000
    chunk = header(values=2**16, block=16, payload=payload)
    with pytest.raises(ValueError, match=r"chunk 0 .* blocks of at least 8192 bytes .* got 65536, 16 and "):
        zarr_objects.decode(stores.one_chunk(chunk), 2**14, array, shard_rows=2**14, k=1)


def test_absent_objects_for_millions_of_entries_are_read_in_bounded_memory(reader, tmp_path):
    """The shard has the usual size, and all its rows keep the first tokens, so it takes a few kilobytes on the disk."""
    url = str(tmp_path / "cache.zarr")
    rows, k = 2**18, 64
    spec = stores.spec_of(1, shard_rows=rows, k=k)
    spec = dataclasses.replace(spec, tokenizer=dataclasses.replace(spec.tokenizer, vocab_size=k))
    mask = np.arange(rows) % 8 != 7
    floats = np.where(mask, -1, np.nan).astype(np.float32)
    lengths = np.full(rows // 8, 8, "<u4")
    values = {
        "tokens": encode_tokens(np.zeros(rows, "<u4"), mask, lengths),
        "target": {
            "counts": (k * mask).astype("<u2"), "gaps": np.zeros(k * mask.sum(), "<u4"),
            "draws": np.zeros(k * mask.sum(), "<u2"),
            "logprobs": np.zeros(k * mask.sum(), "|u1"), "tail": floats, "label_logprob": floats, "entropy": -floats,
        },
    }  # fmt: skip
    stores.write_shard(stores.create(url, spec), spec, 0, values)
    assert not Path(url, "target/gaps/c").exists()
    steps = ["verify", "shard 0", "document 0"]
    check(reader, url, {"verify": "", "shard 0": "LayerNotFoundError", "document 0": ""}, seconds=20, steps=steps)
