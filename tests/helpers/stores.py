"""A small store of random numbers, written with NumPy alone, and functions that falsify it with valid checksums."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import struct
import time
from pathlib import Path

import google_crc32c
import numpy as np

from logitstore import Rows
from logitstore.format import layout, zarr_objects
from logitstore.format.commit import CHECKSUM_FIELD, NO_DIGEST, SHA256_DIGEST, short_digest
from logitstore.format.schemes import Scheme
from logitstore.format.spec import DataSpec, LossSpec, ModelSpec, StoreSpec, TargetSpec, TokenizerSpec
from logitstore.rows import codec
from logitstore.rows.tokens import document_digests, encode_tokens
from logitstore.storage.storage import Storage
from logitstore.store import writer
from logitstore.store.commits.index import commit_names, commits_folder, find_commit
from tests.helpers.encoding import encode_rows

VOCAB = 16
K = 4
SHARD_ROWS = 64
MAX_LENGTH = 12
LAYERS = ("tokens", "target", "losses/ref", "losses/draft")
MODEL = ModelSpec(name="random", revision="0", dtype="float32", padded_vocab_size=VOCAB)


TOPK, SAMPLE = Scheme(k=K), Scheme(name="sample", k=0, num_draws=K)
"""Two schemes with room for the same number of entries. Only stores with SAMPLE have objects of every array."""


def spec_of(num_shards, shard_rows=SHARD_ROWS, k=K, max_length=MAX_LENGTH, scheme=None):
    return StoreSpec(
        tokenizer=TokenizerSpec(name="none", fingerprint="sha256:none", vocab_size=VOCAB, chat_template=None),
        data=DataSpec(source="random.jsonl", digest=None, columns="input_ids", mask_policy="given"),
        max_length=max_length, shard_rows=shard_rows, num_shards=num_shards,
        target=TargetSpec(model=MODEL, scheme=scheme or Scheme(k=k)),
        losses={name: LossSpec(model=MODEL) for name in ("ref", "draft")},
    )  # fmt: skip


def create(url, spec):
    """Creates a store with all layers, without shards."""
    storage = Storage(url)
    writer.create_store(storage, spec)
    writer.add_layer(storage, spec, "target", spec.target)
    for name, loss in spec.losses.items():
        writer.add_layer(storage, spec, f"losses/{name}", loss)
    return storage


def shard_values(rng, shard_rows=SHARD_ROWS, k=K, scheme=None):
    """Returns the arrays of one shard, by layer. Documents of 2 to 12 tokens nearly fill the shard."""
    lengths = []
    while sum(lengths) <= shard_rows - MAX_LENGTH:
        lengths.append(int(rng.integers(2, MAX_LENGTH + 1)))
    num = sum(lengths)
    mask = rng.random(num) < 0.7
    mask[np.cumsum(lengths) - 1] = False
    mask[0] = True
    p = np.where(mask[:, None], rng.dirichlet(np.ones(VOCAB), num), np.nan)
    scheme = scheme or Scheme(k=k)
    ids = rng.integers(0, VOCAB, num)
    if scheme.draws:
        draws = np.zeros(p.shape, np.int64)
        draws[mask] = rng.multinomial(scheme.num_draws, p[mask])
    else:
        draws = likeliest(p, mask, k)
    values = {
        "tokens": encode_tokens(ids, mask, np.array(lengths)),
        "target": target_values(p, ids, draws, TargetSpec(model=MODEL, scheme=scheme)),
    }
    for name in ("ref", "draft"):
        ce, label = (np.where(mask, rng.exponential(2.0, num), np.nan).astype(np.float32) for _ in range(2))
        values[f"losses/{name}"] = {"ce": codec.round_mantissa(ce), "label_logprob": codec.round_mantissa(-label)}
    return values


def max_errors(codebook):
    """Returns the largest coding error of a logprob for each code in nats, float32 [256]: half the wider adjacent step.

    Logprobs below the last code, at ``-exponent * log(256)`` nats, have no bound.
    """
    steps = np.diff(-codebook.table)
    wider = np.maximum(np.append(steps, 0.0), np.insert(steps, 0, 0.0))
    return (wider / 2).astype(np.float32)


def likeliest(p, mask, k):
    """Returns an array of the shape of p: 1 at the k likeliest tokens of the rows that count, otherwise 0."""
    kept = np.zeros(p.shape, np.int64)
    np.put_along_axis(kept, np.argsort(-p, axis=1)[:, :k], mask[:, None].astype(np.int64), 1)
    return kept


def target_values(p, ids, draws, spec):
    """Returns the stored arrays of rows with dense distributions p [R, V], NaN at masked rows.

    The tokens with at least one draw in `draws` [R, V] are kept.
    """
    kept, num_draws = draws > 0, spec.scheme.num_draws
    rows = Rows(
        counts=kept.sum(1),
        token_ids=np.nonzero(kept)[1].astype(np.uint32),
        logprobs=np.log(p[kept]).astype(np.float32),
        weights=(draws[kept] / num_draws).astype(np.float32) if spec.scheme.draws else None,
        tail_mass=np.where(np.isnan(p[:, 0]), np.nan, 1 - np.where(kept, p, 0).sum(1)).astype(np.float32),
        label_logprob=np.log(p[np.arange(len(p)), np.roll(ids, -1)]).astype(np.float32),
        entropy=-(p * np.log(p)).sum(1).astype(np.float32),
    )
    return encode_rows(rows, spec)


def make(url, num_shards=3, seed=0, scheme=TOPK):
    """Writes a finished store, and sets aside the second document of shard 1 in `target`. Returns the URL."""
    spec = spec_of(num_shards, scheme=scheme)
    storage = create(url, spec)
    rng = np.random.default_rng(seed)
    for shard in range(num_shards):
        values = shard_values(rng, scheme=scheme)
        if shard == 1:
            blank(values, 1)
            write_shard(storage, spec, shard, values, set_aside={1: "numbers that are not finite"})
        else:
            write_shard(storage, spec, shard, values)
    return str(url)


def copy(store, url):
    """Copies a store with hard links for objects, which tests may replace but never write to. Returns the new URL."""

    def link_or_copy(source, target):
        (os.link if "/c/" in source else shutil.copyfile)(source, target)

    return str(shutil.copytree(store, url, copy_function=link_or_copy))


def replace(path, data):
    """Replaces a file that other stores may share through a hard link."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def blank(values, document):
    """Removes the values of a document from the layers above its tokens."""
    ends = np.cumsum(values["tokens"]["lengths"].astype(np.int64))
    start, stop = ends[document] - values["tokens"]["lengths"][document], ends[document]
    counts = values["target"]["counts"]
    first, last = (counts[:row].sum(dtype=np.int64) for row in (start, stop))
    for name in ("gaps", "logprobs", "draws"):
        values["target"][name] = np.delete(values["target"][name], slice(first, last))
    for layer, arrays in values.items():
        for name, array in arrays.items():
            if layer != "tokens" and name not in ("gaps", "logprobs", "draws"):
                array[start:stop] = 0 if name == "counts" else np.nan


def write_shard(storage, spec, shard, values, *, set_aside=None, **changes):
    """Commits a shard of each layer in `values`, in order. `changes` replaces counts in the commit records."""
    tokens = values["tokens"]
    computed_from = None
    for layer, arrays in values.items():
        if layer.startswith("losses/"):
            computed_from = find_commit(storage, "target", shard).digest
        elif layer == "target":
            computed_from = find_commit(storage, "tokens", shard).digest
        sizes = {
            "documents": len(tokens["lengths"]), "rows": len(tokens["ids"]),
            "counted": num_counted(tokens, () if layer == "tokens" else set_aside or ()),
        } | changes  # fmt: skip
        writer.LayerWriter(storage, spec, layer).write(
            shard,
            arrays,
            computed_from=computed_from,
            started=time.monotonic(),
            set_aside=set_aside if layer == "target" else None,
            **sizes,
        )


def num_counted(tokens, set_aside):
    """Returns the number of rows with a mask of exactly 1, without those of the documents set aside."""
    mask = tokens["loss_mask"] == 1
    lengths = tokens["lengths"].astype(np.int64)
    ends = np.cumsum(lengths)
    for document in set_aside:
        mask[ends[document] - lengths[document] : ends[document]] = False
    return int(mask.sum())


def change_values(url, layer, shard, **arrays):
    """Replaces values of a shard and commits them again, with the layers above.

    Each of `arrays` is the new array, or a function from the old array to the new one.
    """
    import logitstore

    storage = Storage(url)
    spec = logitstore.open(url).spec
    old = {name: read(url, name, shard) for name in LAYERS}
    for name in (*arrays,):
        found = arrays[name]
        old[layer][0][name] = np.asarray(found(old[layer][0][name].copy()) if callable(found) else found)
    tokens = old["tokens"][0]
    if layer == "tokens" and "digests" not in arrays:
        tokens["digests"] = document_digests(tokens["ids"], tokens["loss_mask"], tokens["lengths"])
    for name in LAYERS[LAYERS.index(layer) :]:
        values, commit = old[name]
        for record in commit_names(storage, name, shard):
            storage.remove(f"{commits_folder(name)}/{record}")
        below = layout.below(name)
        writer.LayerWriter(storage, spec, name).write(
            shard, values, documents=commit.documents, rows=commit.rows,
            counted=num_counted(old["tokens"][0], () if name == "tokens" else old["target"][1].set_aside),
            started=time.monotonic(), set_aside=commit.set_aside,
            computed_from=None if below is None else find_commit(storage, below, shard).digest,
        )  # fmt: skip


def read(url, layer, shard):
    """Returns the arrays of a shard and its commit, without the package's checks of the values."""
    import logitstore
    from logitstore.rows.shard_arrays import Part, decode_layer, object_paths

    storage = Storage(url)
    commit = find_commit(storage, layer, shard)
    spec = logitstore.open(url).spec
    paths, _ = object_paths(spec, Part(layer, shard))
    data = [Path(url, path).read_bytes() if Path(url, path).is_file() else None for path in paths]
    return decode_layer(spec, commit, data), commit


def record(url, layer, shard):
    """Returns the path of a shard's commit record."""
    return next(Path(url, "commits", layer).glob(f"{shard:06d}-*.json"))


def change_record(url, layer, shard, change):
    """Changes a commit record, and corrects its checksum and its name. `change` may return a new record."""
    path = record(url, layer, shard)
    value = json.loads(path.read_text())
    del value[CHECKSUM_FIELD]
    changed = change(value)
    path.unlink()
    return put_record(url, layer, shard, value if changed is None else changed)


def put_record(url, layer, shard, value):
    """Writes a commit record with a valid checksum. Counts that the record lacks appear as 1 in its name."""
    whole = value
    if isinstance(value, dict):
        text = json.dumps(value, sort_keys=True)
        whole = value | {CHECKSUM_FIELD: f"{google_crc32c.value(text.encode()):08x}"}
    else:
        value = {}
    counts = [value.get(name) for name in ("documents", "rows", "counted", "entries")]
    counts = [count if type(count) is int and 0 <= count < 10**10 else 1 for count in counts]
    aside = len(value["set_aside"]) if isinstance(value.get("set_aside"), dict) else 0
    digests = [
        short_digest(digest) if isinstance(digest, str) and SHA256_DIGEST.fullmatch(digest) else NO_DIGEST
        for digest in (value.get("digest"), value.get("computed_from"))
    ]
    documents, rows, counted, entries = counts
    name = f"{shard:06d}-{documents}d-{rows}r-{counted}c-{entries}e-{aside}s-{digests[0]}-{digests[1]}.json"
    path = Path(url, "commits", layer, name)
    path.write_text(json.dumps(whole, indent=1, sort_keys=True))
    return path


def change_json(path, change):
    """Changes a JSON file in place. `change` returns the new value, or None if it changed the old one."""
    value = json.loads(Path(path).read_text())
    changed = change(value)
    Path(path).write_text(json.dumps(value if changed is None else changed))


def change_spec(url, group, change):
    """Changes the spec in the attributes of a group."""
    change_json(Path(url, group, "zarr.json"), lambda value: change(value["attributes"]["logitstore"]))


@dataclasses.dataclass
class Object:
    """A stored object split into the bytes before the index and the index."""

    body: bytearray
    index: list[list[int]]

    @staticmethod
    def of(data, num_chunks):
        cut = len(data) - 16 * num_chunks - 4
        numbers = struct.unpack(f"<{2 * num_chunks}Q", data[cut:-4])
        return Object(bytearray(data[:cut]), [list(numbers[i : i + 2]) for i in range(0, len(numbers), 2)])

    def to_bytes(self):
        """Joins the parts, with valid checksums for all chunks that lie within the body."""
        body = bytearray(self.body)
        for offset, size in self.index:
            if size >= 4 and offset + size <= len(body):
                body[offset + size - 4 : offset + size] = crc(bytes(body[offset : offset + size - 4]))
        index = struct.pack(f"<{2 * len(self.index)}Q", *(number for entry in self.index for number in entry))
        return bytes(body) + index + crc(index)


def crc(data):
    return google_crc32c.value(bytes(data)).to_bytes(4, "little")


def num_chunks(array, shard_rows=SHARD_ROWS, k=K):
    return layout.capacity(array, shard_rows, k) // layout.chunk_length(array, shard_rows, k)


def array_of(layer, name):
    return next(array for array in layout.layer_arrays(layer) if array.name == name)


def one_chunk(chunk, before=b""):
    """Returns the object of an array with one inner chunk, from the Blosc bytes of the chunk."""
    return Object(bytearray(before + chunk + b"\0\0\0\0"), [[len(before), len(chunk) + 4]]).to_bytes()


def encoded(values, layer, name, shard_rows=SHARD_ROWS, k=K):
    return zarr_objects.encode(values, array_of(layer, name), shard_rows=shard_rows, k=k)
