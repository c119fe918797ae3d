"""The store: written values are read unchanged; damage and mismatched layers are refused."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import logitstore
from logitstore.commands import main as cli
from logitstore.errors import FormatError, MissingDriverError, StoreNotFoundError
from logitstore.format.codebook import Codebook
from logitstore.format.commit import make_commit
from logitstore.format.schemes import Scheme
from logitstore.format.spec import TargetSpec, from_json
from logitstore.rows import codec
from logitstore.storage.options import without_credentials
from logitstore.storage.storage import Storage
from logitstore.store import writer
from tests.helpers import stores
from tests.helpers.dumped import edit_record, record
from tests.helpers.encoding import encode_rows
from tests.helpers.tiny import VOCAB_SIZE, dense_logprobs, topk_rows


@pytest.fixture
def copy(tiny_store, tmp_path):
    """A store that a test may damage."""
    return shutil.copytree(tiny_store, tmp_path / "cache.zarr")


def test_documents_by_number_equal_those_of_the_shards(tiny_store):
    store = logitstore.open(tiny_store)
    assert store.num_documents == len(store) == 24
    assert sorted(store.layers) == ["losses/reference", "target", "tokens"]
    number = 0
    for shard in store.shards():
        for i in range(len(shard)):
            document, same = shard.document(i), store[number]
            np.testing.assert_array_equal(document.ids, same.ids)
            np.testing.assert_array_equal(document.rows.token_ids, same.rows.token_ids)
            np.testing.assert_array_equal(document.rows.counts > 0, document.loss_mask)
            span = slice(shard.starts[i], shard.starts[i + 1])
            np.testing.assert_array_equal(store.loss("reference")[number], shard.losses["reference"][span])
            number += 1
    assert number == 24
    assert store.num_rows == sum(len(store[i].ids) for i in range(24))
    np.testing.assert_array_equal(store[-1].ids, store[23].ids)


def test_rows_of_a_document_equal_the_oracle(tiny, tiny_store):
    from transformers import AutoModelForCausalLM

    store = logitstore.open(tiny_store)
    document = store[17]
    model = AutoModelForCausalLM.from_pretrained(tiny.target).eval()
    true = topk_rows(dense_logprobs(model, document.ids), document.ids, document.loss_mask, 16)
    assert document.rows.logprobs.dtype == np.float32
    np.testing.assert_array_equal(document.rows.token_ids, true.token_ids)
    step = stores.max_errors(store.spec.target.codebook)[store.spec.target.codebook.encode(true.logprobs)]
    # All logprobs of a row also shift by at most its largest coding error, so that they sum to 1 with the tail.
    assert (np.abs(document.rows.logprobs - true.logprobs) <= step + step.max() + 1e-5).all()
    np.testing.assert_allclose(document.rows.tail_mass, true.tail_mass, rtol=2e-2)


def test_gap_is_the_difference_of_two_losses(tiny_store):
    store = logitstore.open(tiny_store)
    gap = store.gap("reference", "reference")
    assert len(gap) == 24
    np.testing.assert_array_equal(np.isnan(gap[5]), ~store[5].loss_mask)
    assert np.nanmax(np.abs(gap[5])) == 0


def test_unknown_loss_is_refused_and_existing_ones_are_named(tiny_store):
    with pytest.raises(logitstore.LayerNotFoundError, match=r"one of \['reference'\].*got reference=refrence"):
        logitstore.open(tiny_store).loss("refrence")


@pytest.mark.parametrize("document", [24, -25])
def test_document_outside_the_store_is_an_index_error(tiny_store, document):
    with pytest.raises(IndexError, match=f"between -24 and 23, got document={document}"):
        logitstore.open(tiny_store)[document]


def test_store_on_another_file_system_reads_the_same(tiny_store):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(tiny_store, "/bucket/cache.zarr", recursive=True)
    local, remote = logitstore.open(tiny_store), logitstore.open("memory://bucket/cache.zarr")
    for document in (0, 11, 23):
        np.testing.assert_array_equal(local[document].rows.logprobs, remote[document].rows.logprobs)
    assert logitstore.verify(remote) == []


def test_losses_of_other_target_rows_are_stale_and_refused(copy):
    path = record(copy, "losses/reference", 1)
    origin = path.name.removesuffix(".json").rpartition("-")[2]
    edit_record(path, computed_from="sha256:" + "0" * 64)
    path.rename(path.with_name(path.name.replace(origin, "0" * 12)))
    store = logitstore.open(copy)
    assert store.layers["losses/reference"].stale == {1}
    with pytest.raises(logitstore.IdentityError, match="shard 1 of layer 'losses/reference' must be computed from"):
        store.read_shard(1)
    (problem,) = logitstore.verify(store)
    assert (problem.layer, problem.shard) == ("losses/reference", 1)
    assert problem.reason == f"stale values, computed from target {'0' * 12}, but target is {origin} now"


def test_shard_without_its_commit_record_is_missing(copy):
    record(copy, "target", 1).unlink()
    store = logitstore.open(copy)
    assert store.layers["target"].missing == [1]
    message = r"got shard=1 of layer 'target', which is not \(.* of 3 shards"
    with pytest.raises(logitstore.LayerNotFoundError, match=message):
        store.read_shard(1)
    with pytest.raises(logitstore.LayerNotFoundError, match="shard=1"):
        store[int(store.catalog.first_document[1])]


def test_shard_read_without_layers_is_not_cached_as_complete(tiny_store):
    store = logitstore.open(tiny_store)
    assert store.shard(0, layers=()).rows is None
    assert store.shard(0).rows is not None


def test_spec_with_fewer_shards_than_are_committed_is_refused(copy):
    path = Path(copy, "zarr.json")
    metadata = json.loads(path.read_text())
    metadata["attributes"]["logitstore"]["num_shards"] = 2
    path.write_text(json.dumps(metadata))
    with pytest.raises(FormatError, match=r"ends before shard 2, but 1 committed .* its end: zarr.json was changed"):
        logitstore.open(copy)


def test_store_ends_at_the_first_missing_shard_of_tokens(copy):
    record(copy, "tokens", 1).unlink()
    store = logitstore.open(copy)
    assert store.num_shards == 1
    assert 0 < store.num_documents < 24


def test_writing_again_gives_the_same_bytes(copy):
    store = logitstore.open(copy)
    before = {path: path.read_bytes() for path in (Path(copy) / "target").rglob("c/*")}
    arrays = store.reader.read_arrays("target", 1)
    commit = store.reader.commit("target", 1)
    again = writer.LayerWriter(Storage(copy), store.spec, "target").write(
        1,
        arrays,
        documents=commit.documents,
        rows=commit.rows,
        counted=commit.counted,
        computed_from=commit.computed_from,
        started=0.0,
    )
    assert again.digest == commit.digest
    assert before == {path: path.read_bytes() for path in (Path(copy) / "target").rglob("c/*")}


def test_shorter_shard_replaces_all_entries_of_a_longer_one(copy):
    """A killed writer may have left longer objects, which the next writer replaces completely."""
    store = logitstore.open(copy)
    arrays = store.reader.read_arrays("target", 1)
    commit = store.reader.commit("target", 1)
    half = {**arrays, **{name: arrays[name][: commit.entries // 2] for name in ("gaps", "logprobs", "draws")}}
    size = {"documents": commit.documents, "rows": commit.rows, "counted": 1, "computed_from": None, "started": 0.0}
    record(copy, "target", 1).unlink()
    into = writer.LayerWriter(Storage(copy), store.spec, "target")
    into.write(1, half, **size)
    group = zarr.open_group(copy, mode="r")["target"]
    start = store.spec.shard_rows * store.spec.target.scheme.k
    assert not group["gaps"][start + commit.entries // 2 : 2 * start].any()


def test_info_and_verify_report_the_store_on_the_command_line(copy, capsys):
    assert cli.main(["info", str(copy)]) == 0
    shown = capsys.readouterr().out
    assert "24 documents" in shown
    assert "target: complete" in shown
    assert "topk, k 16; 16.0 entries on average" in shown
    assert cli.main(["info", "--json", str(copy)]) == 0
    facts = json.loads(capsys.readouterr().out)
    on_disk = sum(path.stat().st_size for path in (Path(copy) / "target").rglob("c/*"))
    assert 0 <= sum(facts["layers"]["target"]["bytes"].values()) - on_disk < 10_000  # the arrays' own zarr.json
    assert cli.main(["verify", str(copy)]) == 0
    (Path(copy) / "target/tail/c/0").write_bytes(b"")
    capsys.readouterr()
    assert cli.main(["verify", str(copy)]) == 1
    assert "target/0: tail" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("missing.zarr", "url must lead to a store, got url=missing.zarr"),
        ("nosuch://bucket/x", "protocol that fsspec knows, got url=nosuch://bucket/x"),
        ("abfs://user:secret@container/x", "got url=abfs://user@container/x; pip install adlfs"),
    ],
)
def test_url_that_cannot_be_opened_is_one_line(url, message, capsys):
    assert cli.main(["info", url]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1
    assert "secret" not in shown


def test_invalid_scheme_argument_is_refused_with_a_next_step_for_the_api(tiny_store, measured):
    with pytest.raises(ValueError, match=r"^scheme must be a Scheme, got scheme='topk'; .*schemes.make_scheme"):
        logitstore.open(tiny_store, scheme="topk")
    with pytest.raises(ValueError, match=r"got hybrid, .*; omit scheme \(--k and --mass\) to read"):
        logitstore.open(measured["hybrid"], scheme=Scheme(k=2))


@pytest.mark.parametrize("shard", [-1, 3])
def test_shard_number_outside_the_store_is_told_from_a_missing_shard(copy, shard):
    store = logitstore.open(copy)
    for read in (store.read_shard, lambda number: store.reader.commit("target", number)):
        with pytest.raises(
            logitstore.LayerNotFoundError, match=f"^shard must be at least 0 and below 3, got shard={shard};"
        ):
            read(shard)
    record(copy, "target", 2).unlink()
    with pytest.raises(
        logitstore.LayerNotFoundError, match=r"got shard=2 of .*; run the dump again to finish the layer"
    ):
        logitstore.open(copy).read_shard(2)


def test_errors_inherit_the_builtin_ones(tmp_path):
    for error, builtin in (
        (StoreNotFoundError, FileNotFoundError),
        (FormatError, ValueError),
        (logitstore.IdentityError, ValueError),
        (logitstore.LayerNotFoundError, LookupError),
        (logitstore.DamagedShardError, OSError),
        (MissingDriverError, ImportError),
    ):
        assert issubclass(error, builtin)
        assert issubclass(error, logitstore.LogitStoreError)


def change_attributes(folder, group, change):
    path = Path(folder, group, "zarr.json")
    metadata = json.loads(path.read_text())
    change(metadata["attributes"])
    path.write_text(json.dumps(metadata))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.clear(), "store must be a JSON object, got store=None"),
        (lambda a: a["logitstore"].update(format_version=7), "format_version must be 1, got format_version=7"),
        (lambda a: a["logitstore"].update(shard_rows="many"), "shard_rows must be of type int, got .*'many'"),
        (lambda a: a["logitstore"].update(extra=1), "known fields only, got 'extra'"),
        (lambda a: a["logitstore"].pop("tokenizer"), "must have a field 'tokenizer'"),
        (lambda a: a["logitstore"]["data"].update(columns="pictures"), "columns must be one of .*got .*'pictures'"),
        (lambda a: a["logitstore"].update(max_length=1), "max_length must be at least 2, got max_length=1"),
    ],
)
def test_malformed_metadata_is_refused(copy, change, message):
    change_attributes(copy, "", change)
    with pytest.raises(FormatError, match=message):
        logitstore.open(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shard": 2}, "a commit record that describes shard 2"),
        ({"rows": -1}, "negative counts"),
        ({"rows": "3"}, "rows='3'"),
        ({"more": 1}, "missing or unknown fields"),
        ({"checksums": {}}, "whose checksums are not those"),
        ({"rows": 10**9}, "a commit record named 000001-.*, but with the content of 000001-.*-1000000000r-"),
        ({"digest": "sha256:0"}, "digest='sha256:0'"),
        ({"set_aside": {"first": "why"}}, "malformed set_aside"),
        (
            {"crc32c": "00000000"},
            "a commit record whose content has the checksum [0-9a-f]{8}, not the stated '00000000'",
        ),
    ],
)
def test_malformed_commit_is_damage(copy, change, message):
    edit_record(record(copy, "tokens", 1), **change)
    with pytest.raises(logitstore.DamagedShardError, match=message):
        logitstore.open(copy).read_shard(1)


def test_commit_with_more_values_than_a_shard_can_have_is_damage(copy):
    path = record(copy, "tokens", 1)
    edit_record(path, rows=10**9)
    path.rename(path.with_name(re.sub("[0-9]+r-", f"{10**9}r-", path.name)))
    with pytest.raises(logitstore.DamagedShardError, match="1000000000 values of ids, more than a shard has room for"):
        logitstore.open(copy).read_shard(1)


def test_writing_with_another_target_tokenizer_or_scheme_is_refused(copy):
    spec = logitstore.open(copy).spec
    other = replace(spec, tokenizer=replace(spec.tokenizer, fingerprint="sha256:other", name="elsewhere"))
    with pytest.raises(logitstore.IdentityError, match=r"store.tokenizer.fingerprint must be 'sha256:.*got finger"):
        writer.create_store(Storage(copy), other)
    moved = replace(spec, tokenizer=replace(spec.tokenizer, name="elsewhere"))
    writer.create_store(Storage(copy), moved)
    for target, message in (
        (replace(spec.target, scheme=Scheme(k=8)), r"target.scheme must be topk, k 16 as in the store, got topk, k 8;"),
        (
            replace(spec.target, model=replace(spec.target.model, revision="1")),
            r"target.model must be .* \(revision 0\) as in the store, got .* \(revision 1\);",
        ),
    ):
        with pytest.raises(logitstore.IdentityError, match=message):
            writer.add_layer(Storage(copy), spec, "target", target)


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "x" * 65, "zarr.json", "a b"])
def test_reference_names_cannot_leave_the_store(copy, name):
    from logitstore.format.layout import losses_layer

    with pytest.raises(ValueError, match="got name="):
        losses_layer(name)


def test_credentials_in_a_url_are_dropped():
    assert without_credentials("s3://key:secret@bucket/a@b") == "s3://bucket/a@b"
    assert without_credentials("/tmp/a:b@c") == "/tmp/a:b@c"


def test_specs_are_unchanged_by_json(tiny_store):
    from logitstore.format.spec import StoreSpec, TargetSpec, to_json

    spec = logitstore.open(tiny_store).spec
    assert from_json(TargetSpec, json.loads(json.dumps(to_json(spec.target))), "target") == spec.target
    assert from_json(StoreSpec, json.loads(json.dumps(to_json(spec))), "store") == replace(spec, target=None, losses={})


@given(
    hnp.arrays(np.float32, st.integers(0, 50), elements=st.floats(-40, 0, width=32)),
    st.floats(1, 8),
)
def test_codes_are_nearest_and_within_the_stated_error(logprobs, exponent):
    book = Codebook(exponent=exponent)
    codes = book.encode(logprobs)
    clamped = np.maximum(logprobs, book.table[-1])
    distance = np.abs(book.table[codes] - clamped)
    assert (distance <= np.abs(book.table[None] - clamped[:, None]).min(1) + 1e-4).all()
    assert (distance <= stores.max_errors(book)[codes] + 1e-4).all()


@given(hnp.arrays(np.float32, st.integers(0, 50), elements=st.floats(width=32)))
def test_mantissa_rounding_has_the_stated_error_and_keeps_special_values(values):
    rounded = codec.round_mantissa(values, 7)
    finite = np.isfinite(values) & np.isfinite(rounded)
    assert (np.abs(rounded[finite] - values[finite]) <= np.abs(values[finite]) * 2.0**-8 + 1e-36).all()
    np.testing.assert_array_equal(rounded[~np.isfinite(values)], values[~np.isfinite(values)])
    assert (rounded[np.isnan(values)].view(np.uint32) == 0x7FC00000).all()  # the fill value of float arrays
    assert not (rounded[finite].view(np.uint32) & 0xFFFF).any()


@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 12))
def test_decoded_rows_sum_to_one_with_their_tail(seed, num_rows, k):
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(VOCAB_SIZE, 0.05), num_rows)
    mask = rng.random(num_rows) < 0.7
    ids = rng.integers(0, VOCAB_SIZE, num_rows + 1)
    rows = topk_rows(np.log(np.maximum(p, 1e-30)), ids[:num_rows], mask & (np.arange(num_rows) < num_rows - 1), k)
    spec = TargetSpec(model=stores.MODEL, scheme=Scheme(k=k))
    decoded = codec.decode(encode_rows(rows, spec), spec)
    for i in range(num_rows):
        row = decoded.slice(i, i + 1)
        if len(row.token_ids):
            assert abs(np.exp(row.logprobs.astype(float)).sum() + row.tail_mass[0] - 1) < 1e-5


def test_commit_digest_changes_with_the_values(tiny_store):
    store = logitstore.open(tiny_store)
    arrays = store.reader.read_arrays("losses/reference", 0)
    size = {"documents": 1, "rows": len(arrays["ce"]), "counted": 0, "computed_from": None, "seconds": 0.0}
    size["made_by"] = store.layers["losses/reference"].made_by
    first = make_commit("losses/reference", 0, arrays, **size)
    assert first.digest == store.reader.commit("losses/reference", 0).digest
    changed = {name: values.copy() for name, values in arrays.items()}
    changed["ce"][np.flatnonzero(np.isfinite(changed["ce"]))[0]] += 0.5
    assert make_commit("losses/reference", 0, changed, **size).digest != first.digest
