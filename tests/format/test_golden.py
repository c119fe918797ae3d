"""The golden stores of format version 1: every later version must open them and read the same values.

They are tests/data/store_v1_*, one for each scheme. A JSON file beside each contains every stored value, as plain Zarr
reads it. The decoded values are compared in float64 with the invented models of tests/helpers/golden.py.
`python -m tests.format.test_golden` writes them again. That is allowed only for a format version that is not yet
released; afterwards they never change.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil

import numpy as np
import pytest
import zarr

import logitstore
from logitstore.commands import main as cli
from logitstore.errors import LayerNotFoundError
from logitstore.format import layout, schemes, zarr_objects
from logitstore.format.commit import layer_digest
from logitstore.storage.storage import Storage
from tests.helpers import golden
from tests.helpers.golden import (
    LAST,
    MAX_LENGTH,
    MISSING,
    MODELS,
    OBJECTS,
    SCHEMES,
    SET_ASIDE,
    SHARD_ROWS,
    SHARDS,
    SIXTEENTHS,
)

STEP = 0.07
"""Tolerance of a decoded logprob above -4 in nats: twice the coding error, for the entry itself and for the row."""


@pytest.fixture(scope="module", params=SCHEMES)
def name(request):
    return request.param


@pytest.fixture
def folder(name):
    return golden.folder(name)


@pytest.fixture
def expected(folder):
    return json.loads(folder.with_suffix(".json").read_text())


@pytest.fixture
def store(folder):
    return logitstore.open(folder)


def test_golden_store_has_the_expected_counts_and_spec(store, name):
    assert (store.num_documents, store.num_rows, store.num_counted) == (7, 23, 11)
    assert (store.num_shards, store.spec.num_shards) == (4, 4)
    assert {layer: found.missing for layer, found in store.layers.items()} == MISSING
    assert not any(layer.stale for layer in store.layers.values())
    spec = store.spec
    assert (spec.format_version, spec.shard_rows, spec.max_length) == (1, SHARD_ROWS, MAX_LENGTH)
    assert (spec.tokenizer.name, spec.tokenizer.vocab_size, spec.tokenizer.chat_template) == ("example/target", 6, None)
    assert (spec.data.source, spec.data.columns, spec.data.mask_policy) == ("a.jsonl", "prompt_response", "response")
    assert (spec.target.scheme, spec.target.codebook.exponent, spec.target.temperature) == (SCHEMES[name], 4, 1)
    assert {layer: loss.model.name for layer, loss in spec.losses.items()} == {
        "linear": "example/linear",
        "uniform": "example/uniform",
    }
    (append,) = spec.appends
    assert (append.data.source, append.first_shard, append.num_shards) == ("b.jsonl", 2, 2)


def test_documents_are_numbered_across_shards(store):
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
    assert golden.all_values(store) == expected["values"]


def test_document_index_has_the_length_and_digest_of_every_document(store):
    """The index includes the documents that were set aside and the document that has only tokens."""
    found = store.documents()
    members = [document for shard in SHARDS for document in shard]
    assert found.lengths.tolist() == [len(ids) for ids, _ in members]
    assert found.digests.tolist() == [golden.document_digest(*document) for document in members]
    assert found.first_document.tolist() == [0, 2, 4, 6, 7]


def test_plain_zarr_reads_the_same_values(folder, expected):
    group = zarr.open_group(folder, mode="r")
    for place, arrays in expected["values"].items():
        layer, shard = place.rsplit("/", 1)
        for part, values in arrays.items():
            array = group[f"{layer}/{part}"]
            room = array.shape[0] // 4
            first = int(shard) * room
            assert golden.values_of({part: array[first : first + len(values)]}) == {part: values}
            rest = array[first + len(values) : first + room]
            assert np.array_equal(rest, np.full(len(rest), array.fill_value), equal_nan=array.dtype.kind == "f")


def test_decoded_rows_equal_the_targets_distributions(store, name):
    for shard in range(3):
        rows = store.read_shard(shard, layers=("target",)).rows
        ids = store.read_shard(shard, layers=()).ids
        counted = {row for where, row in SIXTEENTHS if where == shard}
        assert set(np.flatnonzero(rows.counts).tolist()) == counted
        for row in counted:
            p, kept = np.array(SIXTEENTHS[shard, row]) / 16, list(golden.KEPT[name][shard, row])
            found = rows.slice(row, row + 1)
            assert found.token_ids.tolist() == kept
            likely = p[kept] > 0  # the last code stands for all smaller probabilities
            np.testing.assert_allclose(found.logprobs[likely], np.log(p[kept][likely]), atol=STEP)
            assert (found.logprobs[~likely] < -20).all()
            weights = golden.weights(name, shard, row, p)
            assert (weights is None) == (found.weights is None) == (name in ("topk", "nucleus"))
            if weights is not None:
                np.testing.assert_allclose(found.weights, weights, rtol=STEP)
            drawn = np.array(list(golden.KEPT[name][shard, row].values())) > 0
            if name == "hybrid":
                assert (found.weights[drawn] == np.float32(store.spec.target.step)).all()
            if name == "sample":
                np.testing.assert_allclose(found.weights.sum(), 1.0, rtol=1e-6)
            assert p[kept][found.logprobs.argmax()] == p[kept].max()
            np.testing.assert_allclose(found.tail_mass[0], 1 - p[kept].sum(), rtol=2e-2)
            np.testing.assert_allclose(found.label_logprob[0], math.log(p[ids[row + 1]]), rtol=2**-8)
            entropy = -(p[p > 0] * np.log(p[p > 0])).sum()
            np.testing.assert_allclose(found.entropy[0], entropy, rtol=2**-8, atol=1e-12)


@pytest.mark.parametrize("loss", MODELS)
def test_stored_losses_equal_the_cross_entropy_with_their_models(store, name, loss):
    q = np.array(MODELS[loss])
    for shard in range(2):
        found = store.read_shard(shard, layers=("target", f"losses/{loss}"))
        aside = SET_ASIDE.get((f"losses/{loss}", shard), {})
        for row in range(len(found.ids)):
            document = int(np.searchsorted(found.starts, row, side="right")) - 1
            if (shard, row) not in SIXTEENTHS or document in aside:
                assert np.isnan(found.losses[loss][row])
                continue
            p, kept = np.array(SIXTEENTHS[shard, row]) / 16, list(golden.KEPT[name][shard, row])
            ce = golden.cross_entropy(p[kept], 1 - p[kept].sum(), q[kept])
            np.testing.assert_allclose(found.losses[loss][row], ce, atol=STEP)


def test_documents_and_shards_set_aside_are_named_by_info(store, folder, name, capsys):
    found = {
        (layer, shard): store.reader.commit(layer, shard).set_aside
        for layer, found in store.layers.items()
        for shard in sorted(found.committed)
    }
    assert {place: aside for place, aside in found.items() if aside} == SET_ASIDE
    assert cli.main(["info", str(folder)]) == 0
    shown = capsys.readouterr().out
    for text in ("entropy that is not finite", "ce that is not finite", "killed by signal 9 (out of memory)",
                 f"  scheme    {schemes.describe(SCHEMES[name])}; "):  # fmt: skip
        assert text in shown


def test_measured_fidelity_is_in_the_commit_records(store):
    for layer, found in store.layers.items():
        for shard in sorted(found.committed):
            assert store.reader.commit(layer, shard).fidelity == golden.FIDELITY.get((layer, shard), {})


def test_golden_store_is_intact_and_reading_changes_no_file(store, folder, expected):
    assert logitstore.verify(store) == []
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == set(expected["files"])
    for file, digest in expected["files"].items():
        assert hashlib.sha256((folder / file).read_bytes()).hexdigest() == digest, file
    assert sum((folder / file).stat().st_size for file in files) < 100_000


@pytest.mark.parametrize("kind", OBJECTS)
def test_objects_of_several_chunks_are_read(kind):
    layer, array, shard_rows, k, values = OBJECTS[kind]
    data = bytes.fromhex(json.loads((golden.FOLDER / "objects_v1.json").read_text())[kind])
    spec = next(spec for spec in layout.layer_arrays(layer) if spec.name == array)
    found = zarr_objects.decode(data, len(values), spec, shard_rows=shard_rows, k=k)
    np.testing.assert_array_equal(found, values.astype(spec.dtype))


def test_digests_of_values_and_specs_stay_the_same(store):
    """Later versions must compute the same digests from the same values and specs, or they refuse existing stores."""
    for layer, found in store.layers.items():
        for shard in sorted(found.committed):
            commit = store.reader.commit(layer, shard)
            assert layer_digest(layer, store.reader.read_arrays(layer, shard)) == commit.digest
            assert found.made_by == commit.made_by


def test_missing_shard_can_be_added_to_a_golden_store(folder, name, tmp_path):
    url = shutil.copytree(folder, tmp_path / "cache.zarr")
    before = {path: path.read_bytes() for path in url.rglob("*") if path.is_file()}
    store = logitstore.open(url)
    values = store.reader.read_arrays("tokens", 3)
    arrays = golden.target_arrays(name, 3, dict([LAST]))
    golden.write(Storage(url), store.spec, "target", 3, arrays, values, store.reader.commit("tokens", 3).digest)
    again = logitstore.open(url)
    assert again.layers["target"].missing == []
    assert again[6].rows.token_ids.tolist() == [0, 1]
    assert logitstore.verify(again) == []
    assert {path: path.read_bytes() for path in before} == before


def test_objects_exist_only_for_arrays_with_values(folder, name):
    """Only `sample` stores draws."""
    assert (folder / "target/draws/c").exists() == (name == "sample")
    assert sorted(path.name for path in (folder / "target/gaps/c").iterdir()) == ["0", "1", "2"]


if __name__ == "__main__":
    for scheme in SCHEMES:
        golden.generate(scheme)
    golden.generate_objects()
