"""Searches for inputs that make reading a store crash, guided by coverage. Not part of the test run; needs atheris.

    pip install atheris
    python -m tests.helpers.fuzz_store TARGET [-max_total_time=SECONDS] [-timeout=10] [-rss_limit_mb=2500] [FOLDER]

TARGET is one of

    decode    the bytes of an object, unchanged or with corrected checksums
    commits   the content of a commit record, unchanged or with a corrected checksum, and the names of records
    specs     the attributes of the groups, and other small JSON
    store     a whole store in which one file has other content: opened, described, verified, read

An input that crashes is written to the current folder as crash-...; give its name instead of FOLDER to run it again.
Inputs worth keeping are collected in FOLDER. A crash is everything except success, a LogitStoreError or a ValueError of
`zarr_objects.decode`. A run that takes 10 seconds or 2.5 GB is a crash too.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["logitstore"]):
    import logitstore
    from logitstore.errors import LogitStoreError
    from logitstore.format import layout, spec, zarr_objects
    from logitstore.format.commit import CHECKSUM_FIELD, Commit, commit_bytes, parse_commit
    from logitstore.format.strict_json import parse_json, to_json_bytes
    from logitstore.inspection import info
    from logitstore.storage.storage import Storage
    from logitstore.store.catalog import stored_spec
    from logitstore.store.commits import appends, protocol, set_aside
    from logitstore.store.commits.index import index_from_names
    from logitstore.store.reader import Store

from tests.helpers import stores

SIZES = [(64, 4), (2, 1), (2**15, 5), (2**14, 3)]
"""Rows of a shard and entries of a row: one inner chunk, the smallest shard, and several chunks of rows and entries."""
ARRAYS = [(layer, array.name) for layer in stores.LAYERS[:3] for array in layout.layer_arrays(layer)]
SPECS = (spec.StoreSpec, spec.TargetSpec, spec.LossSpec, spec.Append)


def decode(data: bytes) -> None:
    """Decodes an object. The first three bytes of `data` choose the array, the size and the corrections."""
    if len(data) < 3:
        return
    layer, name = ARRAYS[data[0] % len(ARRAYS)]
    rows, k = SIZES[data[1] % len(SIZES)]
    array, content = stores.array_of(layer, name), data[3:]
    chunks = stores.num_chunks(array, rows, k)
    if data[2] & 1:
        content = patched(content, array, layout.chunk_length(array, rows, k), chunks, header=bool(data[2] & 2))
    room = layout.capacity(array, rows, k)
    for num in {0, 1, room // 2, room}:
        try:
            values = zarr_objects.decode(content, num, array, shard_rows=rows, k=k)
        except ValueError:
            continue
        if len(values) != num or values.dtype.str != array.dtype:
            raise AssertionError(f"{len(values)} values of {values.dtype}")


def patched(content: bytes, array: layout.ArraySpec, length: int, chunks: int, *, header: bool) -> bytes:
    """Corrects the checksums of an object and, with `header`, the headers of its chunks."""
    if len(content) < 16 * chunks + 4:
        content = content + b"\xff" * (16 * chunks + 4)
    found = stores.Object.of(content, chunks)
    if header:
        num_bytes = length * int(array.dtype[2:])
        for offset, size in found.index:
            if size >= 20 and offset + size <= len(found.body):
                numbers = b"".join(n.to_bytes(4, "little") for n in (num_bytes, num_bytes, size - 4))
                stored = found.body[offset + 2] & zarr_objects.BLOSC_STORED
                flags = zarr_objects.BLOSC_FLAGS | stored
                found.body[offset : offset + 16] = (
                    bytes([*zarr_objects.BLOSC_VERSIONS, flags, int(array.dtype[2:])]) + numbers
                )
    return found.to_bytes()


def commits_of(data: bytes) -> None:
    """Parses a commit record. The first byte of `data` chooses the layer; the record's name comes from its content."""
    if not data:
        return
    layer, content = stores.LAYERS[data[0] % len(stores.LAYERS)], data[1:]
    names = [part.decode(errors="surrogateescape") for part in content.split(b"\n")]
    index = index_from_names(layer, sorted(set(names)))
    for place in range(len(index)):
        if index.name(place) not in names:
            raise AssertionError("a name that was not there")
    try:
        value = parse_json("x", content)
    except LogitStoreError:
        value = None
    if isinstance(value, dict):
        value.pop(CHECKSUM_FIELD, None)
        path = stores.put_record(FOLDER, layer, 1, value)
        name, content = path.name, path.read_bytes()
        path.unlink()
    else:
        name = "000001-1d-1r-0c-0e-0s-000000000000-000000000000.json"
    try:
        commit = parse_commit(content, layer, 1, name)
    except LogitStoreError:
        return
    if parse_commit(commit_bytes(commit), layer, 1, commit.name) != commit:
        raise AssertionError("a record that does not survive being written")


def specs(data: bytes) -> None:
    """Parses JSON as a spec. The first byte of `data` chooses the class."""
    if not data:
        return
    try:
        value = parse_json("x", data[1:])
    except LogitStoreError:
        return
    cls = SPECS[data[0] % len(SPECS)]
    for values in (value, value.get("attributes") if isinstance(value, dict) else None):
        try:
            if cls is spec.Append:
                spec.from_json(cls, values, "append")
            elif isinstance(values, dict):
                made = stored_spec(cls, values, "x")
                again = spec.from_json(cls, parse_json("x", to_json_bytes(spec.to_json(made))), "x")
                if again != made or spec.maker(again) != spec.maker(made):
                    raise AssertionError("a spec that does not survive being written")
        except LogitStoreError:
            pass
    array = layout.TARGET[data[0] % len(layout.TARGET)]
    zarr_objects.num_shards_of(value, array, shard_rows=64, k=4)
    with contextlib.suppress(LogitStoreError):
        protocol._parse(value, COMMIT)


def store(data: bytes) -> None:
    """Reads a store in which one file is replaced. The first byte of `data` chooses the file, the rest is its content.

    Checksums and record names are corrected for some of the first bytes.
    """
    if not data:
        return
    name, content = NAMES[data[0] % len(NAMES)], data[1:]
    path = Path(FOLDER, name)
    kept = path.read_bytes() if path.is_file() else None
    made = path
    try:
        if "/c/" in name:
            array = stores.array_of(*name.split("/c/")[0].rsplit("/", 1))
            content = patched(content, array, layout.chunk_length(array, 64, 4), 1, header=bool(data[0] & 128))
        path.unlink(missing_ok=True)
        if name.startswith("commits") and data[0] & 128:
            value = parse_json("x", content)
            if isinstance(value, dict):
                value.pop(CHECKSUM_FIELD, None)
                made = stores.put_record(FOLDER, name.removeprefix("commits/").rpartition("/")[0], 1, value)
        if made is path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        use(verify=len(data) % 4 == 0)  # verifying is ten times as slow as the rest
    except LogitStoreError:
        pass
    finally:
        made.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        if kept is not None:
            path.write_bytes(kept)


def use(verify: bool) -> None:
    """Runs the operations that read a store. Each one may raise a LogitStoreError."""
    found = Store(STORAGE)
    for action in (
        lambda: "\n".join(info.render(info.describe(found))),
        lambda: verify and [str(problem) for problem in logitstore.verify(found, num_threads=1)],
        lambda: [
            appends.pending_append(STORAGE, found.spec.appends),
            [set_aside.read_set_aside(STORAGE, layer) for layer in found.layers],
        ],
        lambda: found.read_shard(1),
        lambda: found[len(found) // 2] if len(found) else None,
    ):
        with contextlib.suppress(LogitStoreError):
            action()


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Changes parsed JSON in most cases, and otherwise raw bytes."""
    rng = random.Random(seed)
    try:
        value = [json.loads(data[1:])]
    except (ValueError, RecursionError):
        value = []
    if not value or rng.random() < 0.2:
        return bytes(atheris.Mutate(data, max_size))
    for _ in range(rng.choice([1, 1, 2, 4])):
        parents = [value]
        for parent in parents:  # the list grows during the loop until it has all lists and objects
            parents += [child for child in children(parent).values() if isinstance(child, dict | list)]
        parent = rng.choice(parents)
        if not parent:
            continue
        key = rng.choice(list(children(parent)))
        other = rng.choice(parents)
        kind = rng.randrange(6)
        if kind == 0 and parent is not value:
            del parent[key]
        elif kind == 1 and isinstance(parent, dict):
            parent[rng.choice(["", "name", "x", "logitstore", "shape", "\ud800"])] = copy.deepcopy(rng.choice(VALUES))
        elif kind == 2 and isinstance(parent[key], str):
            parent[key] = bytes(atheris.Mutate(parent[key].encode(errors="replace"), 100)).decode(errors="replace")
        elif kind == 3 and type(parent[key]) is int:
            parent[key] += rng.choice([-1, 1, 2**8, 2**16, 2**31, -(2**63)])
        elif kind == 4 and other:
            parent[key] = copy.deepcopy(rng.choice(list(children(other).values())))
        else:
            parent[key] = copy.deepcopy(rng.choice(VALUES))
    return (data[:1] + json.dumps(value[0]).encode())[:max_size]


def children(value: Any) -> dict[Any, Any]:
    """Returns the members of a list or an object by index or key."""
    return value if isinstance(value, dict) else dict(enumerate(value))


VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 64, 2**14, 2**15, 2**24, 2**31, 2**53, 2**63, 10**18, 10**30, 0.5, -0.0, 1e308,
    "", "x", "..", "tokens", "target", "topk", "nucleus", "sample", "hybrid", "sha256:" + "0" * 64, "0" * 8, "\ud800",
    [], {}, [1], [[]], {"1": "x"}, {"name": "numcodecs.pickle"}, {"0": {}},
]  # fmt: skip
TARGETS = {"decode": decode, "commits": commits_of, "specs": specs, "store": store}
FOLDER = ""
STORAGE: Storage
NAMES: list[str] = []
COMMIT: Commit


def prepare() -> None:
    """Makes the store that the inputs change."""
    global FOLDER, STORAGE, COMMIT
    # `sample` is the scheme for which every array has objects.
    FOLDER = stores.make(Path(tempfile.mkdtemp(prefix="fuzz"), "cache.zarr"), scheme=stores.SAMPLE)
    STORAGE = Storage(FOLDER)
    COMMIT = stores.read(FOLDER, "target", 1)[1]
    found = [path.relative_to(FOLDER).as_posix() for path in Path(FOLDER).rglob("*") if path.is_file()]
    NAMES.extend(sorted(name for name in found if name.endswith("zarr.json") or "/c/1" in name or "/000001-" in name))
    NAMES.extend(["appends/000001.json", "appends/000001.claim", "set_aside/target/000001.json"])


def seeds(target: str, folder: str) -> None:
    """Writes the files of a valid store as the first inputs."""

    def add(*parts: bytes) -> None:
        Path(folder, f"{len(os.listdir(folder)):04d}").write_bytes(b"".join(parts))

    append = b'{"data": {"source": "a", "digest": null, "columns": "text", "mask_policy": "all", "documents": null}, '
    append += b'"first_shard": 3, "num_shards": 1}'
    if target == "decode":
        for i, (layer, name) in enumerate(ARRAYS):
            data = Path(FOLDER, layer, name, "c/1").read_bytes()
            for kind in (0, 1, 3):
                add(bytes([i, 0, kind]), data)
                add(bytes([i, 3, kind]), data)
    elif target == "commits":
        for i, layer in enumerate(stores.LAYERS):
            add(bytes([i]), stores.record(FOLDER, layer, 1).read_bytes())
            add(bytes([i]), "\n".join(os.listdir(Path(FOLDER, "commits", layer))).encode())
    elif target == "specs":
        for i in range(6):
            for path in Path(FOLDER).rglob("zarr.json"):
                add(bytes([i]), path.read_bytes())
            add(bytes([i]), append)
    else:
        for i, name in enumerate(NAMES):
            path = Path(FOLDER, name)
            for high in (0, 128):
                number = next(n for n in range(high, 256) if n % len(NAMES) == i)
                add(bytes([number]), path.read_bytes() if path.is_file() else append)


def main() -> None:
    """Fuzzes one target until it is stopped."""
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(__doc__)
    target = sys.argv.pop(1)
    prepare()
    first = tempfile.mkdtemp(prefix="seeds")
    seeds(target, first)
    if not any(Path(argument).is_file() for argument in sys.argv[1:]):
        if not any(Path(argument).is_dir() for argument in sys.argv[1:]):
            sys.argv.append(tempfile.mkdtemp(prefix="inputs"))
        sys.argv.append(first)
    sys.argv += ["-len_control=0", "-max_len=8192", "-reduce_inputs=0"]
    atheris.Setup(sys.argv, TARGETS[target], custom_mutator=None if target == "decode" else mutate)
    try:
        atheris.Fuzz()
    finally:
        shutil.rmtree(Path(FOLDER).parent)


if __name__ == "__main__":
    main()
