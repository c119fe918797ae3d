"""The golden store of format version 1, tests/data/store_v1: every later version must open it, and read these numbers.

tests/data/store_v1.json has every stored value, as plain Zarr reads it. What the values mean is checked against the
invented models below, in float64. `python tests/test_golden.py` makes both anew, which is for a format that is not yet
released; afterwards they stay as they are.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import zarr

import logitstore
from logitstore import cli, commits, layout, objects
from logitstore.errors import LayerNotFoundError
from logitstore.storage import Storage

FOLDER = Path(__file__).parent / "data"
STORE = FOLDER / "store_v1"
EXPECTED = FOLDER / "store_v1.json"

VOCAB, K, MASS, SHARD_ROWS, MAX_LENGTH = 6, 3, 0.8, 64, 4
SHARDS = [
    [([4, 1, 3, 5], [0, 1, 1, 0]), ([1, 2, 0], [1, 1, 0])],
    [([2, 3, 1], [1, 1, 0]), ([5, 0, 4, 4], [0, 1, 1, 0])],
    [([1, 1], [1, 0]), ([3, 2, 5], [0, 1, 0])],
    [([0, 4, 2, 1], [0, 0, 1, 0])],
]
"""Token ids and loss masks of the documents. The first shard is the example of docs/format.md (in a store of larger
shards, where some objects are compressed and some are not), the last two were appended, and of the last there are only
tokens: the target was killed there three times."""
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
"""The target's distribution, times 16, by shard and row: at all rows that count but those of a document set aside."""
KEPT = {
    (0, 1): [3, 4, 0], (0, 2): [5], (0, 4): [2, 0], (0, 5): [0, 5, 3],
    (1, 0): [3], (1, 1): [1, 0, 2], (2, 0): [1, 3, 0], (2, 3): [0, 1, 2],
}  # fmt: skip
"""The smallest sets that reach 0.8, at most 3 tokens."""
MODELS = {"uniform": [1 / 6] * 6, "linear": [(token + 1) / 21 for token in range(6)]}
"""What the models of the losses say at every row."""
SET_ASIDE = {("target", 1): {1: "entropy that is not finite"}, ("losses/linear", 0): {1: "ce that is not finite"}}
"""Documents, by layer and shard."""
MISSING = {"tokens": [], "target": [3], "losses/uniform": [3], "losses/linear": [2, 3]}
PLACES = np.arange(60_000)
OBJECTS = {
    "an absent chunk": ("tokens", "ids", 2**15, 1, np.where(PLACES < 2**14, 0, PLACES % 6)[:20_000]),
    "two chunks of entries": ("target", "token_ids", 2**15, 3, PLACES % 6),
    "floats": ("target", "entropy", 2**14, 1, np.where(PLACES % 7 == 6, np.nan, PLACES % 5 / 4)[:100]),
    "stored as it is": ("target", "logprobs", 2**8, 1, (PLACES * PLACES * 7919 // 256 % 256)[:250]),
}
"""Layer, array, rows of a shard, entries of a row and values of objects that a small store has not."""
STEP = 0.07
"""Nats by which the code of a logprob above -4 can be off, twice: its own error, and that of the row."""


@pytest.fixture(scope="module")
def expected():
    return json.loads(EXPECTED.read_text())


@pytest.fixture
def store():
    return logitstore.open(STORE)


def test_it_says_what_it_holds(store):
    assert (store.num_documents, store.num_rows, store.num_counted) == (7, 23, 11)
    assert (store.num_shards, store.spec.num_shards) == (4, 4)
    assert {name: layer.missing for name, layer in store.layers.items()} == MISSING
    assert not any(layer.stale for layer in store.layers.values())
    spec = store.spec
    assert (spec.format_version, spec.shard_rows, spec.max_length) == (1, SHARD_ROWS, MAX_LENGTH)
    assert (spec.tokenizer.name, spec.tokenizer.vocab_size, spec.tokenizer.chat_template) == ("example/target", 6, None)
    assert (spec.data.source, spec.data.columns, spec.data.mask_policy) == ("a.jsonl", "prompt_response", "response")
    assert (spec.target.scheme.name, spec.target.scheme.k, spec.target.scheme.mass) == ("nucleus", K, MASS)
    assert (spec.target.codebook.range_nats, spec.target.codebook.exponent, spec.target.temperature) == (16, 2, 1)
    assert {name: loss.model.name for name, loss in spec.losses.items()} == {
        "linear": "example/linear",
        "uniform": "example/uniform",
    }
    (append,) = spec.appends
    assert (append.data.source, append.first_shard, append.num_shards) == ("b.jsonl", 2, 2)


def test_documents_are_numbered_through_the_shards(store):
    documents = [(shard, *document) for shard, members in enumerate(SHARDS) for document in members]
    for number, (shard, ids, mask) in enumerate(documents):
        if shard == 3:
            with pytest.raises(LayerNotFoundError, match="got shard=3 of layer 'target'"):
                store[number]
            continue
        document = store[number]
        assert document.ids.tolist() == ids
        assert document.loss_mask.tolist() == [number != 3 and bool(counts) for counts in mask]
    assert store.read_shard(3, layers=()).ids.tolist() == [0, 4, 2, 1]
    assert store.read_shard(3, layers=()).loss_mask.tolist() == [False, False, True, False]


def test_every_stored_value_is_read(store, expected):
    assert all_values(store) == expected["values"]


def test_plain_zarr_reads_the_same_values(expected):
    group = zarr.open_group(STORE, mode="r")
    for place, arrays in expected["values"].items():
        layer, shard = place.rsplit("/", 1)
        for name, values in arrays.items():
            array = group[f"{layer}/{name}"]
            room = array.shape[0] // 4
            first = int(shard) * room
            assert values_of({name: array[first : first + len(values)]}) == {name: values}
            rest = array[first + len(values) : first + room]
            assert np.array_equal(rest, np.full(len(rest), array.fill_value), equal_nan=array.dtype.kind == "f")


def test_rows_are_those_of_the_target(store):
    for shard in range(3):
        rows = store.read_shard(shard, layers=("target",)).rows
        ids = store.read_shard(shard, layers=()).ids
        counted = {row for where, row in SIXTEENTHS if where == shard}
        assert set(np.flatnonzero(rows.counts).tolist()) == counted
        for row in counted:
            p, kept = np.array(SIXTEENTHS[shard, row]) / 16, KEPT[shard, row]
            found = rows.slice(row, row + 1)
            assert found.token_ids.tolist() == kept
            np.testing.assert_allclose(found.logprobs, np.log(p[kept]), atol=STEP)
            np.testing.assert_allclose(found.tail_mass[0], 1 - p[kept].sum(), rtol=1e-3)
            np.testing.assert_allclose(found.label_logprob[0], math.log(p[ids[row + 1]]), rtol=2**-13)
            entropy = -(p[p > 0] * np.log(p[p > 0])).sum()
            np.testing.assert_allclose(found.entropy[0], entropy, rtol=2**-13, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_losses_are_those_of_their_models(store, name):
    q = np.array(MODELS[name])
    for shard in range(2):
        found = store.read_shard(shard, layers=("target", f"losses/{name}"))
        aside = SET_ASIDE.get((f"losses/{name}", shard), {})
        for row in range(len(found.ids)):
            document = int(np.searchsorted(found.starts, row, side="right")) - 1
            if (shard, row) not in SIXTEENTHS or document in aside:
                assert np.isnan(found.losses[name][row])
                continue
            p, kept = np.array(SIXTEENTHS[shard, row]) / 16, KEPT[shard, row]
            ce = -(p[kept] * np.log(q[kept])).sum() - (1 - p[kept].sum()) * np.log(1 - q[kept].sum())
            np.testing.assert_allclose(found.losses[name][row], ce, atol=STEP)


def test_what_was_set_aside_is_named(store, capsys):
    found = {
        (name, shard): store.commit(name, shard).set_aside
        for name, layer in store.layers.items()
        for shard in sorted(layer.committed)
    }
    assert {place: aside for place, aside in found.items() if aside} == SET_ASIDE
    assert cli.main(["info", str(STORE)]) == 0
    shown = capsys.readouterr().out
    for text in ("entropy that is not finite", "ce that is not finite", "killed by signal 9 (out of memory)"):
        assert text in shown


def test_it_is_intact_and_reading_it_changes_nothing(store, expected):
    assert logitstore.verify(store) == []
    files = {path.relative_to(STORE).as_posix() for path in STORE.rglob("*") if path.is_file()}
    assert files == set(expected["files"])
    for file, digest in expected["files"].items():
        assert hashlib.sha256((STORE / file).read_bytes()).hexdigest() == digest, file
    assert sum((STORE / file).stat().st_size for file in files) < 100_000


@pytest.mark.parametrize("name", OBJECTS)
def test_larger_objects_are_read(expected, name):
    layer, array, shard_rows, k, values = OBJECTS[name]
    spec = next(spec for spec in layout.layer_arrays(layer) if spec.name == array)
    found = objects.decode(bytes.fromhex(expected["objects"][name]), len(values), spec, shard_rows=shard_rows, k=k)
    np.testing.assert_array_equal(found, values.astype(spec.dtype))


def test_identities_stay_what_they_are(store):
    """Later versions must find the same digests in the same values and specs, or they would refuse what is there."""
    for name, layer in store.layers.items():
        for shard in sorted(layer.committed):
            commit = store.commit(name, shard)
            assert commits.digest(name, store.read_arrays(name, shard)) == commit.digest
            assert layer.made_by == commit.made_by


def test_a_copy_of_it_can_be_finished(tmp_path):
    url = shutil.copytree(STORE, tmp_path / "cache.zarr")
    before = {path: path.read_bytes() for path in url.rglob("*") if path.is_file()}
    store = logitstore.open(url)
    values = store.read_arrays("tokens", 3)
    arrays = target_arrays(3, {(3, 2): [1, 12, 1, 1, 1, 0]}, {(3, 2): [1, 0]})
    write(Storage(url), store.spec, "target", 3, arrays, values, store.commit("tokens", 3).digest)
    again = logitstore.open(url)
    assert again.layers["target"].missing == []
    assert again[6].rows.token_ids.tolist() == [1, 0]
    assert logitstore.verify(again) == []
    assert {path: path.read_bytes() for path in before} == before


def values_of(arrays):
    """Arrays as JSON has them: floats of 32 bits written out, what is not finite as text."""
    return {
        name: [
            value if not isinstance(value, float) or math.isfinite(value) else str(value) for value in array.tolist()
        ]
        for name, array in arrays.items()
    }


def all_values(store):
    """Every stored value, by layer and shard."""
    return {
        f"{name}/{shard}": values_of(store.read_arrays(name, shard))
        for name, layer in store.layers.items()
        for shard in sorted(layer.committed)
    }


# How it was made


def target_arrays(shard, sixteenths=SIXTEENTHS, kept=KEPT):
    """The stored arrays of a shard of the target, from its invented distributions."""
    from logitstore import Rows, codec

    ids = [token for document, _ in SHARDS[shard] for token in document]
    counts, token_ids, logprobs = np.zeros(len(ids), np.int64), [], []
    tail, label, entropy = (np.full(len(ids), np.nan, np.float32) for _ in range(3))
    for row in range(len(ids)):
        if (shard, row) in sixteenths:
            p, chosen = np.array(sixteenths[shard, row]) / 16, kept[shard, row]
            counts[row] = len(chosen)
            token_ids += chosen
            logprobs += np.log(p[chosen]).tolist()
            tail[row], label[row] = 1 - p[chosen].sum(), np.log(p[ids[row + 1]])
            entropy[row] = -(p[p > 0] * np.log(p[p > 0])).sum() + 0.0
    rows = Rows(
        counts=counts, token_ids=np.array(token_ids, np.uint32), logprobs=np.array(logprobs, np.float32),
        tail_mass=tail, label_logprob=label, entropy=entropy,
    )  # fmt: skip
    return codec.encode(rows, codec.Codebook())


def loss_arrays(name, shard, target):
    """The stored arrays of a shard of losses, on the decoded support."""
    from logitstore import codec

    q = np.array(MODELS[name])
    ids = [token for document, _ in SHARDS[shard] for token in document]
    rows = codec.decode(target, codec.Codebook())
    ce, label = np.full(len(ids), np.nan, np.float32), np.full(len(ids), np.nan, np.float32)
    for row in np.flatnonzero(rows.counts):
        found = rows.slice(row, row + 1)
        inside = q[found.token_ids]
        ce[row] = -(np.exp(found.logprobs.astype(float)) * np.log(inside)).sum()
        ce[row] -= float(found.tail_mass[0]) * np.log(max(1 - inside.sum(), 1e-6))
        label[row] = np.log(q[ids[row + 1]])
    return {"ce": codec.round_mantissa(ce), "label_logprob": codec.round_mantissa(label)}


def write(storage, spec, layer, shard, arrays, tokens, computed_from):
    """Commits a shard of a layer; returns its digest."""
    from logitstore import writer

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
    ).digest  # fmt: skip


def generate():
    """Makes the store and the file of expected values beside it, in the place of what is there."""
    from logitstore import appends, set_aside, writer
    from logitstore.spec import Append, DataSpec, LossSpec, ModelSpec, Scheme, StoreSpec, TargetSpec, TokenizerSpec

    def model(name):
        return ModelSpec(name=f"example/{name}", revision="0", dtype="float32", padded_vocab_size=8)

    tokens = [
        {
            "ids": np.array([token for ids, _ in members for token in ids], "<u4"),
            "loss_mask": np.array([counts for _, mask in members for counts in mask], "|u1"),
            "lengths": np.array([len(ids) for ids, _ in members], "<u4"),
        }
        for members in SHARDS
    ]

    def data(source, shards):
        joined = "".join(commits.digest("tokens", tokens[shard]) for shard in shards)
        documents = f"sha256:{hashlib.sha256(joined.encode()).hexdigest()}"
        return DataSpec(
            source=source, digest=None, columns="prompt_response", mask_policy="response", documents=documents
        )

    shutil.rmtree(STORE, ignore_errors=True)
    target = TargetSpec(model=model("target"), scheme=Scheme(name="nucleus", k=K, mass=MASS, k_min=1))
    spec = StoreSpec(
        tokenizer=TokenizerSpec(
            name="example/target", fingerprint=f"sha256:{'0' * 64}", vocab_size=VOCAB, chat_template=None
        ),
        data=data("a.jsonl", (0, 1)), max_length=MAX_LENGTH, shard_rows=SHARD_ROWS, num_shards=2,
    )  # fmt: skip
    storage = Storage(STORE)
    writer.create_store(storage, spec)
    for shard in range(4):
        write(storage, spec, "tokens", shard, tokens[shard], tokens[shard], None)
    appends.write_append(storage, 1, Append(data=data("b.jsonl", (2, 3)), first_shard=2, num_shards=2))
    spec = logitstore.open(STORE).spec
    writer.make_room(storage, spec, "tokens")
    writer.add_layer(storage, spec, "target", target)
    for name in MODELS:
        writer.add_layer(storage, spec, f"losses/{name}", LossSpec(model=model(name)))
    spec = logitstore.open(STORE).spec
    for shard in range(3):
        computed_from = commits.digest("tokens", tokens[shard])
        arrays = target_arrays(shard)
        computed_from = write(storage, spec, "target", shard, arrays, tokens[shard], computed_from)
        for name in MODELS:
            if shard not in MISSING[f"losses/{name}"]:
                losses = loss_arrays(name, shard, arrays)
                for document in SET_ASIDE.get((f"losses/{name}", shard), {}):
                    ends = np.cumsum(tokens[shard]["lengths"].astype(np.int64))
                    for values in losses.values():
                        values[ends[document] - tokens[shard]["lengths"][document] : ends[document]] = np.nan
                write(storage, spec, f"losses/{name}", shard, losses, tokens[shard], computed_from)
    set_aside.record(storage, "target", 3, "killed by signal 9 (out of memory)", 3)
    shutil.rmtree(STORE / "staging", ignore_errors=True)

    # what differs from run to run, as if somebody else had written it
    said = {"writer": "node-1:4242", "written": "2026-11-21T08:50:47+00:00", "when": "2026-11-21T08:50:47+00:00"}
    for path in [*STORE.glob("commits/**/*.json"), *STORE.glob("set_aside/**/*.json")]:
        value = json.loads(path.read_text())
        signed = value.pop(commits.CHECKSUM, None)
        value |= {name: text for name, text in (said | {"seconds": 0.016}).items() if name in value}
        if signed is not None:
            value[commits.CHECKSUM] = f"{google_crc32c.value(json.dumps(value, sort_keys=True).encode()):08x}"
        path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")

    store = logitstore.open(STORE)
    values = all_values(store)
    files = {
        path.relative_to(STORE).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(STORE.rglob("*"))
        if path.is_file()
    }
    encoded = {}
    for name, (layer, array, shard_rows, k, content) in OBJECTS.items():
        spec = next(spec for spec in layout.layer_arrays(layer) if spec.name == array)
        encoded[name] = objects.encode(content.astype(spec.dtype), spec, shard_rows=shard_rows, k=k).hex()
    EXPECTED.write_text(json.dumps({"values": values, "objects": encoded, "files": files}) + "\n")


if __name__ == "__main__":
    generate()
