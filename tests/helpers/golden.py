"""Writes the golden stores in tests/data: one for each scheme, all with the same documents.

`python -m tests.format.test_golden` writes them again. That is allowed only for a format version that is not yet
released; afterwards they never change. Their values come from the invented models in this module.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import struct
import time

import google_crc32c
import numpy as np

import logitstore
from logitstore import Rows
from logitstore.format import layout, zarr_objects
from logitstore.format.commit import CHECKSUM_FIELD, layer_digest
from logitstore.format.schemes import Scheme
from logitstore.format.spec import Append, DataSpec, LossSpec, ModelSpec, StoreSpec, TargetSpec, TokenizerSpec
from logitstore.rows import codec
from logitstore.rows.tokens import encode_tokens
from logitstore.storage.storage import Storage
from logitstore.store import writer
from logitstore.store.commits import appends, set_aside
from tests.helpers.encoding import encode_rows
from tests.helpers.paths import DATA

FOLDER = DATA

VOCAB, SHARD_ROWS, MAX_LENGTH = 6, 64, 4
SCHEMES = {
    "topk": Scheme(k=2),
    "nucleus": Scheme(name="nucleus", k=3, mass=0.8, k_min=1),
    "sample": Scheme(name="sample", k=0, num_draws=4, seed=7),
    "hybrid": Scheme(name="hybrid", k=0, num_draws=4, seed=7),
}
SHARDS = [
    [([4, 1, 3, 5], [0, 1, 1, 0]), ([1, 2, 0], [1, 1, 0])],
    [([2, 3, 1], [1, 1, 0]), ([5, 0, 4, 4], [0, 1, 1, 0])],
    [([1, 1], [1, 0]), ([3, 2, 5], [0, 1, 0])],
    [([0, 4, 2, 1], [0, 0, 1, 0])],
]
"""Token ids and loss masks of the documents. The first shard is the example of docs/format.md, here in a store with
larger shards, where some objects are compressed and some are not. The last two shards were appended. The last one has
only tokens: the target was killed there three times."""
SIXTEENTHS = {
    (0, 1): [2, 1, 0.5, 8, 4, 0.5],
    (0, 2): [0.25, 0.25, 0.25, 0.125, 0.125, 15],
    (0, 4): [6, 0.5, 8, 0.5, 0.5, 0.5],
    (0, 5): [5, 2, 1, 3, 1, 4],
    (1, 0): [0, 0, 0, 16, 0, 0],
    (1, 1): [2, 8, 2, 2, 1, 1],
    (2, 0): [1, 10, 1, 2, 1, 1],
    (2, 3): [4, 4, 4, 2, 1, 1],
}
"""The target's distribution times 16, by shard and row, for each row that counts and is not of a document set aside."""
LAST = (3, 2), [1, 12, 1, 1, 1, 0]
"""The row that is missing, and its distribution."""
KEPT = {
    "topk": {
        (0, 1): {3: 0, 4: 0}, (0, 2): {0: 0, 5: 0}, (0, 4): {0: 0, 2: 0}, (0, 5): {0: 0, 5: 0}, (1, 0): {0: 0, 3: 0},
        (1, 1): {0: 0, 1: 0}, (2, 0): {1: 0, 3: 0}, (2, 3): {0: 0, 1: 0}, (3, 2): {0: 0, 1: 0},
    },
    "nucleus": {
        (0, 1): {0: 0, 3: 0, 4: 0}, (0, 2): {5: 0}, (0, 4): {0: 0, 2: 0}, (0, 5): {0: 0, 3: 0, 5: 0},
        (1, 0): {3: 0}, (1, 1): {0: 0, 1: 0, 2: 0}, (2, 0): {0: 0, 1: 0, 3: 0}, (2, 3): {0: 0, 1: 0, 2: 0},
        (3, 2): {0: 0, 1: 0},
    },
    "sample": {
        (0, 1): {0: 1, 3: 2, 4: 1}, (0, 2): {5: 4}, (0, 4): {0: 1, 2: 2, 4: 1}, (0, 5): {0: 2, 1: 1, 5: 1},
        (1, 0): {3: 4}, (1, 1): {1: 2, 2: 1, 4: 1}, (2, 0): {1: 3, 3: 1}, (2, 3): {0: 1, 1: 1, 2: 1, 3: 1},
        (3, 2): {0: 1, 1: 3},
    },
    "hybrid": {
        (0, 1): {0: 1, 3: 0, 4: 0}, (0, 2): {5: 0}, (0, 4): {0: 0, 2: 0, 4: 1}, (0, 5): {0: 0, 1: 1, 3: 1, 5: 0},
        (1, 0): {3: 0}, (1, 1): {1: 0, 2: 1, 5: 1}, (2, 0): {1: 0, 3: 1}, (2, 3): {0: 0, 1: 0, 2: 0, 4: 1},
        (3, 2): {0: 1, 1: 0},
    },
}  # fmt: skip
"""The kept ids, and how often each was drawn, by scheme, shard and row.

topk: the two likeliest tokens, even if the second has probability 0. nucleus: the smallest set that reaches 0.8, at
most 3 tokens. sample: four draws with replacement. hybrid: all tokens from about 1/4 on, and systematic draws from the
others."""
MODELS = {"uniform": [1 / 6] * 6, "linear": [(token + 1) / 21 for token in range(6)]}
"""The distribution that each model of the losses gives at every row."""
SET_ASIDE = {("target", 1): {1: "entropy that is not finite"}, ("losses/linear", 0): {1: "ce that is not finite"}}
"""Documents that were set aside and the reasons, by layer and shard."""
FIDELITY = {
    ("target", 0): {"rows": 4, "mass": 3.4375, "kl_tail": 0.25, "kl_renormalised": 0.5, "kl_codes": 0.000125},
    ("losses/uniform", 0): {
        "rows": 4, "alpha": 2.5, "alpha_estimate": 2.625, "alpha_error": 0.25, "angle_row": 40.5, "angle_shard": 9.75,
        "shards": 1,
    },
}  # fmt: skip
"""Invented measurements in some of the records."""
MISSING = {"tokens": [], "target": [3], "losses/uniform": [3], "losses/linear": [2, 3]}
PLACES = np.arange(60_000)
OBJECTS = {
    "an absent chunk": ("tokens", "ids", 2**15, 1, np.where(PLACES < 2**14, 0, PLACES % 6)[:20_000]),
    "two chunks of entries": ("target", "gaps", 2**15, 3, PLACES % 6),
    "floats": ("target", "entropy", 2**14, 1, np.where(PLACES % 7 == 6, np.nan, PLACES % 5 / 4)[:100]),
    "stored as it is": ("target", "logprobs", 2**8, 1, (PLACES * PLACES * 7919 // 256 % 256)[:250]),
}
"""Objects that do not occur in a small store: layer, array, rows of a shard, entries of a row, and values."""


def folder(name):
    """Returns the folder of the store of a scheme. The file with its expected values is beside it."""
    return FOLDER / f"store_v1_{name}"


def model(name):
    return ModelSpec(name=f"example/{name}", revision="0", dtype="float32", padded_vocab_size=8)


def target_spec(name):
    return TargetSpec(model=model("target"), scheme=SCHEMES[name])


def weights(name, shard, row, p):
    """Returns the weight of each kept id for schemes that draw; None for the others."""
    kept = KEPT[name][shard, row]
    if not SCHEMES[name].draws:
        return None
    step = target_spec(name).step
    return [draws * step if name == "sample" or draws else p[token] for token, draws in kept.items()]


def target_arrays(name, shard, sixteenths=SIXTEENTHS):
    """Returns the stored arrays of a shard of the target, from its invented distributions."""
    ids = [token for document, _ in SHARDS[shard] for token in document]
    counts, token_ids, logprobs, weighed = np.zeros(len(ids), np.int64), [], [], []
    tail, label, entropy = (np.full(len(ids), np.nan, np.float32) for _ in range(3))
    for row in range(len(ids)):
        if (shard, row) in sixteenths:
            p, chosen = np.array(sixteenths[shard, row]) / 16, list(KEPT[name][shard, row])
            counts[row] = len(chosen)
            token_ids += chosen
            with np.errstate(divide="ignore"):
                logprobs += np.log(p[chosen]).tolist()
            weighed += weights(name, shard, row, p) or []
            tail[row], label[row] = 1 - p[chosen].sum(), np.log(p[ids[row + 1]])
            entropy[row] = -(p[p > 0] * np.log(p[p > 0])).sum() + 0.0
    rows = Rows(
        counts=counts, token_ids=np.array(token_ids, np.uint32), logprobs=np.array(logprobs, np.float32),
        weights=np.array(weighed, np.float32) if SCHEMES[name].draws else None,
        tail_mass=tail, label_logprob=label, entropy=entropy,
    )  # fmt: skip
    return encode_rows(rows, target_spec(name))


def document_digest(ids, mask):
    """Returns the digest of a document as docs/format.md defines it."""
    content = struct.pack(f"<{len(ids)}I", *ids) + bytes(mask)
    return struct.unpack("<Q", hashlib.sha256(content).digest()[:8])[0]


def cross_entropy(p, tail, q):
    """Returns the soft cross entropy of one row with a model's probabilities `q` at the kept ids, in float64."""
    return -(p * np.log(q)).sum() - tail * np.log(max(1 - q.sum(), 1e-6))


def loss_arrays(name, loss, shard, target):
    """Returns the stored arrays of a shard of losses, computed from the decoded rows of the target."""
    q = np.array(MODELS[loss])
    ids = [token for document, _ in SHARDS[shard] for token in document]
    rows = codec.decode(target, target_spec(name))
    ce, label = np.full(len(ids), np.nan, np.float32), np.full(len(ids), np.nan, np.float32)
    for row in np.flatnonzero(rows.counts):
        found = rows.slice(row, row + 1)
        p, tail = np.exp(found.logprobs.astype(float)), float(found.tail_mass[0])
        ce[row] = cross_entropy(p, tail, q[found.token_ids])
        label[row] = np.log(q[ids[row + 1]])
    return {"ce": codec.round_mantissa(ce), "label_logprob": codec.round_mantissa(label)}


def write(storage, spec, layer, shard, arrays, tokens, computed_from):
    """Commits a shard of a layer, and returns its digest."""
    aside = SET_ASIDE.get((layer, shard), {})
    ends = np.cumsum(tokens["lengths"].astype(np.int64))
    counted = tokens["loss_mask"].copy()
    for (other, where), documents in SET_ASIDE.items():
        if where == shard and layer != "tokens" and other in ("target", layer):
            for document in documents:
                counted[ends[document] - tokens["lengths"][document] : ends[document]] = 0
    return writer.LayerWriter(storage, spec, layer).write(
        shard, arrays, documents=len(ends), rows=int(ends[-1]), counted=int(counted.sum()),
        computed_from=computed_from, started=time.monotonic(), set_aside=aside,
        fidelity=FIDELITY.get((layer, shard)),
    ).digest  # fmt: skip


def values_of(arrays):
    """Returns arrays as values for JSON: every float32 in full, and values that are not finite as text."""
    return {
        name: [
            value if not isinstance(value, float) or math.isfinite(value) else str(value) for value in array.tolist()
        ]
        for name, array in arrays.items()
    }


def all_values(store):
    """Returns every stored value, by layer and shard."""
    return {
        f"{name}/{shard}": values_of(store.reader.read_arrays(name, shard))
        for name, layer in store.layers.items()
        for shard in sorted(layer.committed)
    }


def generate(name):
    """Writes the store of a scheme and the file of its expected values, replacing the old ones."""
    store = folder(name)
    tokens = [
        encode_tokens(
            np.array([token for ids, _ in members for token in ids]),
            np.array([counts for _, mask in members for counts in mask]),
            np.array([len(ids) for ids, _ in members]),
        )
        for members in SHARDS
    ]

    def data(source, shards):
        joined = "".join(layer_digest("tokens", tokens[shard]) for shard in shards)
        documents = f"sha256:{hashlib.sha256(joined.encode()).hexdigest()}"
        return DataSpec(
            source=source, digest=None, columns="prompt_response", mask_policy="response", documents=documents
        )

    shutil.rmtree(store, ignore_errors=True)
    spec = StoreSpec(
        tokenizer=TokenizerSpec(
            name="example/target", fingerprint=f"sha256:{'0' * 64}", vocab_size=VOCAB, chat_template=None
        ),
        data=data("a.jsonl", (0, 1)), max_length=MAX_LENGTH, shard_rows=SHARD_ROWS, num_shards=2,
    )  # fmt: skip
    storage = Storage(store)
    writer.create_store(storage, spec)
    for shard in range(4):
        write(storage, spec, "tokens", shard, tokens[shard], tokens[shard], None)
    appends.write_append(storage, 1, Append(data=data("b.jsonl", (2, 3)), first_shard=2, num_shards=2))
    spec = logitstore.open(store).spec
    writer.make_room(storage, spec, "tokens")
    writer.add_layer(storage, spec, "target", target_spec(name))
    for loss in MODELS:
        writer.add_layer(storage, spec, f"losses/{loss}", LossSpec(model=model(loss)))
    spec = logitstore.open(store).spec
    for shard in range(3):
        computed_from = layer_digest("tokens", tokens[shard])
        arrays = target_arrays(name, shard)
        computed_from = write(storage, spec, "target", shard, arrays, tokens[shard], computed_from)
        for loss in MODELS:
            if shard not in MISSING[f"losses/{loss}"]:
                losses = loss_arrays(name, loss, shard, arrays)
                for document in SET_ASIDE.get((f"losses/{loss}", shard), {}):
                    ends = np.cumsum(tokens[shard]["lengths"].astype(np.int64))
                    for values in losses.values():
                        values[ends[document] - tokens[shard]["lengths"][document] : ends[document]] = np.nan
                write(storage, spec, f"losses/{loss}", shard, losses, tokens[shard], computed_from)
    set_aside.record(storage, "target", 3, "killed by signal 9 (out of memory)", 3)
    shutil.rmtree(store / "staging", ignore_errors=True)

    # Fields that differ from run to run get fixed values, so that every run writes the same bytes.
    said = {"writer": "node-1:4242", "written": "2026-11-21T08:50:47+00:00", "when": "2026-11-21T08:50:47+00:00"}
    for path in [*store.glob("commits/**/*.json"), *store.glob("set_aside/**/*.json")]:
        value = json.loads(path.read_text())
        signed = value.pop(CHECKSUM_FIELD, None)
        value |= {field: text for field, text in (said | {"seconds": 0.016}).items() if field in value}
        if signed is not None:
            value[CHECKSUM_FIELD] = f"{google_crc32c.value(json.dumps(value, sort_keys=True).encode()):08x}"
        path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")

    files = {
        path.relative_to(store).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(store.rglob("*"))
        if path.is_file()
    }
    values = all_values(logitstore.open(store))
    store.with_suffix(".json").write_text(json.dumps({"values": values, "files": files}) + "\n")


def generate_objects():
    """Writes the file of objects that do not occur in a small store."""
    encoded = {}
    for name, (layer, array, shard_rows, k, content) in OBJECTS.items():
        spec = next(spec for spec in layout.layer_arrays(layer) if spec.name == array)
        encoded[name] = zarr_objects.encode(content.astype(spec.dtype), spec, shard_rows=shard_rows, k=k).hex()
    (FOLDER / "objects_v1.json").write_text(json.dumps(encoded) + "\n")
