"""Hostile stores: false commit records, and values that are not valid rows. See helpers/hostile.py."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import stores
from tests.helpers.hostile import FILES, check, damaged


@pytest.fixture
def url(small_store, tmp_path):
    """A copy of a valid store, which the test makes invalid."""
    return stores.copy(small_store, tmp_path / "cache.zarr")


# Names of commits


def test_files_without_a_valid_commit_name_are_ignored(reader, url):
    folder = Path(url, "commits/target")
    name = stores.record(url, "target", 1).name
    number, *rest = name.split("-")
    rest = "-".join(rest)
    for other in (
        f"0000002-{rest}", f"+00002-{rest}", f" 00002-{rest}", f"{number}-{rest}x", f"-00002-{rest}",
        f"\u0660\u0660\u0660\u0660\u0660\u0662-{rest}", name.replace("d-", "9" * 30 + "d-"),
        name.replace("r-", "e5r-"), name.upper(), "000002.json", ".json", "000002-1d-1r-1c-1e-0s.json",
        "\x1b[2J.json", "a\nb.json", "é.json",
    ):  # fmt: skip
        if other != name:
            (folder / other).write_text("{}")
    with open(os.fsencode(str(folder)) + b"/\xff\xfe.json", "wb") as file:
        file.write(b"{}")
    check(reader, url, {"open": "", "info": "", "shard 1": "", "dataset of losses": ""})


def test_reading_is_fast_beside_100000_foreign_files(reader, url):
    folder = Path(url, "commits/target")
    for i in range(100_000):
        os.close(os.open(folder / f"{i:06d}.junk", os.O_CREAT | os.O_WRONLY))
    check(reader, url, {"open": "", "verify": "", "shard 1": ""}, seconds=10, steps=["verify", "shard 1"])


def test_reading_is_fast_beside_5000_empty_json_files(reader, url):
    folder = Path(url, "commits/target")
    for i in range(5000):
        os.close(os.open(folder / f"{i:06d}.json", os.O_CREAT | os.O_WRONLY))
    check(reader, url, {"open": "", "verify": "exit 1", "shard 1": ""}, seconds=10, steps=["verify", "shard 1"])


def with_value(**fields):
    return lambda record: record.update(fields)


@pytest.mark.parametrize("field", ["documents", "rows", "counted", "entries"])
@pytest.mark.parametrize("layer", ["tokens", "target", "losses/ref"])
def test_huge_count_is_refused_without_allocating_memory(reader, url, layer, field):
    stores.change_record(url, layer, 1, lambda record: record.update({field: 9_999_999_999}))
    outcomes = check(reader, url, {"open": "", "shard 0": ""})
    assert re.match("DamagedShardError: shard 1 ", outcomes["shard 1"])


def test_huge_counts_in_all_records_are_refused(reader, url):
    counts = dict.fromkeys(("documents", "rows", "counted"), 9_999_999_999)
    for shard in range(3):
        for layer in stores.LAYERS:
            entries = 9_999_999_999 if layer == "target" else 0
            stores.change_record(url, layer, shard, with_value(**counts, entries=entries))
    outcomes = check(reader, url, {"open": "", "shard 0": "DamagedShardError.*more than a shard has room for"})
    assert "more than a shard has room for" in outcomes["dataset"]


def test_record_of_a_shard_beyond_the_store_is_ignored(reader, url):
    for layer in stores.LAYERS[1:]:
        name = stores.record(url, layer, 1).name
        for number in ("000003", "999999", "999999999"):
            path = Path(url, "commits", layer, number + name[6:])
            path.write_text("{")
    outcomes = check(reader, url, {"open": "", "info": "", "shard 2": "", "dataset of losses": ""})
    assert "shard 3" not in outcomes


def test_tokens_record_of_a_shard_beyond_the_store_is_refused(reader, url):
    name = stores.record(url, "tokens", 1).name
    Path(url, "commits", "tokens", "000003" + name[6:]).write_text("{")
    check(reader, url, {"open": ".*ends before shard 3, but 1 committed shards .* after its end", "info": ""})


def test_several_records_of_a_shard_are_damage(reader, url):
    path = stores.record(url, "target", 1)
    path.with_name(path.name.replace("d-", "0d-", 1)).write_bytes(path.read_bytes())
    check(reader, url, damaged("several commit records"))


RECORDS = {
    "negative": (with_value(rows=-1), "negative counts"),
    "float": (with_value(rows=3.0), "rows=3.0"),
    "bool": (with_value(rows=True), "rows=True"),
    "string": (with_value(documents="3"), "documents='3'"),
    "list": (lambda record: [record], "missing or unknown fields"),
    "null": (lambda record: {}, "missing or unknown fields"),
    "more": (with_value(more=1), "missing or unknown fields"),
    "shard": (with_value(shard=2), "a commit record that describes shard 2"),
    "shard bool": (with_value(shard=True), "shard=True"),
    "layer": (with_value(layer="../../x"), "of layer '../../x'"),
    "digest": (with_value(digest="sha256:" + "g" * 64), "digest="),
    "digest long": (with_value(digest="sha256:" + "0" * 10**6), "digest="),
    "computed_from": (with_value(computed_from="sha256:" + "0" * 64), "must be computed from|several|stale"),
    "computed from nothing": (with_value(computed_from=None), "must be computed from"),
    "made_by": (with_value(made_by="\x1b[2J" * 100), "must be made with the layer's spec"),
    "checksums a list": (with_value(checksums=[]), r"checksums=\[\]"),
    "checksums others": (with_value(checksums={}), "checksums are not those"),
    "checksum deep": (lambda r: r["checksums"].update(tail=[[[[1]]]]), "malformed checksums"),
    "checksum long": (lambda r: r["checksums"].update(tail="0" * 10**6), "malformed checksums"),
    "checksum": (lambda r: r["checksums"].update(tail="00000000"), "tail with checksum"),
    "seconds": (with_value(seconds=10**400), "seconds=1"),
    "seconds negative": (with_value(seconds=-1.5), "seconds=-1.5"),
    "seconds long": (with_value(seconds=1e300), "seconds=1e.300"),
    "set_aside a list": (with_value(set_aside=[0]), r"set_aside=\[0\]"),
    "set_aside beyond": (with_value(set_aside={"9999999999": "x"}), "sets aside document 9999999999"),
    "set_aside negative": (with_value(set_aside={"-1": "x"}), "malformed set_aside"),
    "set_aside text": (with_value(set_aside={"a/../b": "x"}), "malformed set_aside"),
    "set_aside unicode": (with_value(set_aside={"\u0661": "x"}), "malformed set_aside"),
    "set_aside deep": (with_value(set_aside={"1": {"a": "b"}}), "malformed set_aside"),
    "set_aside many": (lambda r: r.update(set_aside={str(i): "x" for i in range(50_000)}), "more set aside than"),
    "set_aside other": (with_value(set_aside={"0": "x"}), "with counted="),
    "set_aside none": (with_value(set_aside={}), "with counted="),
    "counted fewer": (with_value(counted=1), "with counted=1, although"),
    "fewer rows": (with_value(rows=3, documents=5), "more documents than rows"),
}


@pytest.mark.parametrize("case", RECORDS)
def test_invalid_record_is_reported_as_damage(reader, url, case):
    change, message = RECORDS[case]
    stores.change_record(url, "target", 1, change)
    check(reader, url, damaged(message, "(DamagedShardError|IdentityError)"))


def test_record_with_a_duplicate_field_is_damage(reader, url):
    path = stores.record(url, "target", 1)
    path.write_text(path.read_text().replace('"rows":', '"rows": 3,\n "rows":'))
    check(reader, url, damaged("not JSON"))


def test_terminal_control_characters_in_records_and_specs_do_no_harm(reader, url):
    for field in ("writer", "written"):
        stores.change_record(url, "target", 1, with_value(**{field: "\x1b]0;owned\x07\ud800"}))
    check(reader, url, {"open": "", "shard 1": ""})
    for group, change in (
        ("", lambda a: a["tokenizer"].update(name="\x1b[31m\ud800")),
        ("", lambda a: a["data"].update(source="a\r\x1b[2J\nb")),
        ("losses/ref", lambda a: a["model"].update(name="\x9b31m\x00")),
    ):
        stores.change_spec(url, group, change)
    check(reader, url, {"open": "", "shard 1": ""})


@pytest.mark.parametrize("content", FILES)
def test_file_that_is_not_a_record_is_damage(reader, url, content):
    stores.record(url, "target", 1).write_bytes(FILES[content])
    check(reader, url, damaged("a commit record"), seconds=20)


# Invalid values with valid checksums


def at(place, value):
    def change(array):
        array[place] = value
        return array

    return change


def first_counted(value):
    def change(array):
        array[np.flatnonzero(np.isfinite(array))[0]] = value
        return array

    return change


def first_masked(value):
    def change(array):
        array[np.flatnonzero(np.isnan(array))[0]] = value
        return array

    return change


VALUES = {
    "ids": ("tokens", {"ids": at(3, stores.VOCAB)}, "token ids beyond the vocabulary"),
    "ids huge": ("tokens", {"ids": at(3, 2**32 - 1)}, "token ids beyond the vocabulary"),
    "mask 2": ("tokens", {"loss_mask": at(0, 2)}, "a loss mask with values other than 0 and 1"),
    "mask 255": ("tokens", {"loss_mask": lambda mask: mask * 255}, "a loss mask with values other than 0 and 1"),
    "mask at the end": ("tokens", {"loss_mask": at(-1, 1)}, "a loss mask with values other than 0 and 1"),
    "length 0": ("tokens", {"lengths": lambda x: np.append(x[:-2], [0, x[-1] + x[-2]])}, "outside 1 to 12 tokens"),
    "length beyond": ("tokens", {"lengths": lambda x: np.append(np.zeros(len(x) - 1), x.sum())}, "outside 1 to 12"),
    "lengths beyond": ("tokens", {"lengths": lambda x: x + 2**31}, "lengths that add up to .* rows, not"),
    "lengths that wrap": ("tokens", {"lengths": at(0, 2**32 - 1)}, "lengths that add up to .* rows, not"),
    "lengths 0": ("tokens", {"lengths": lambda x: x * 0}, "lengths that add up to 0 rows, not"),
    "gaps": ("target", {"gaps": at(5, stores.VOCAB)}, "token ids beyond the vocabulary"),
    "gaps huge": ("target", {"gaps": lambda x: x + 2**31}, "token ids beyond the vocabulary"),
    "gaps that wrap": ("target", {"gaps": at(slice(4), [2**32 - 2, 0, 0, 0])}, "token ids beyond the vocabulary"),
    "draws": ("target", {"draws": at(3, 1)}, "draws with checksum"),
    "counts": ("target", {"counts": at(0, 3)}, "counts that do not add up"),
    "counts beyond": ("target", {"counts": at(0, 65535)}, "counts that do not add up"),
    "counts elsewhere": ("target", {"counts": lambda x: np.roll(x, 1)}, "counts that are 0 at a row that counts"),
    "counts 0": ("target", {"counts": lambda x: x * 0}, "counts that do not add up"),
    "counts beyond k": (
        "target",
        {"counts": lambda x: np.where(np.arange(len(x)) == np.flatnonzero(x)[0], 5, x)
         - (np.arange(len(x)) == np.flatnonzero(x)[1])},
        "counts that are 0 at a row that counts",
    ),
    "tail": ("target", {"tail": first_counted(0.5)}, "tail that is NaN or out of range"),
    "tail NaN": ("target", {"tail": first_counted(np.nan)}, "tail that is NaN or out of range"),
    "tail inf": ("target", {"tail": first_counted(np.inf)}, "tail that is NaN or out of range"),
    "tail where masked": ("target", {"tail": first_masked(-1)}, "tail with the wrong number of rows, or with a value"),
    "label": ("target", {"label_logprob": first_counted(3e38)}, "label_logprob that is NaN or out of range"),
    "label NaN": ("target", {"label_logprob": first_counted(np.nan)}, "label_logprob that is NaN or out of range"),
    "entropy": ("target", {"entropy": first_counted(-1)}, "entropy that is NaN or out of range"),
    "entropy inf": ("target", {"entropy": first_counted(np.inf)}, "entropy that is NaN or out of range"),
    "entropy -inf": ("target", {"entropy": first_counted(-np.inf)}, "entropy that is NaN or out of range"),
    "ce": ("losses/ref", {"ce": first_counted(-1)}, "ce that is NaN or out of range"),
    "ce NaN": ("losses/ref", {"ce": first_counted(np.nan)}, "ce that is NaN or out of range"),
    "ce inf": ("losses/ref", {"ce": first_counted(np.inf)}, "ce that is NaN or out of range"),
    "ce where masked": ("losses/ref", {"ce": first_masked(1)}, "ce with the wrong number of rows, or with a value"),
    "label of losses": ("losses/ref", {"label_logprob": first_counted(2)}, "label_logprob that is NaN or out of range"),
}  # fmt: skip


@pytest.mark.parametrize("case", VALUES)
def test_impossible_values_are_damage_despite_valid_checksums(reader, url, case):
    layer, arrays, message = VALUES[case]
    stores.change_values(url, layer, 1, **arrays)
    check(reader, url, damaged(message))


def moved(draws):
    """Takes one draw from the last entry that has two, and adds it to the first entry."""
    draws[np.flatnonzero(draws > 1)[-1]] -= 1
    draws[0] += 1
    return draws


DRAWS = {"none": at(3, 0), "many": at(3, 65535), "one more": at(0, 4), "of another row": moved, "0": lambda x: x * 0}


@pytest.mark.parametrize("case", DRAWS)
def test_impossible_draws_are_damage(reader, tmp_path, case):
    url = stores.make(tmp_path / "cache.zarr", scheme=stores.SAMPLE)
    check(reader, url, {"shard 1": "", "verify": ""}, steps=["shard 1", "verify"])
    stores.change_values(url, "target", 1, draws=DRAWS[case])
    check(reader, url, damaged("draws that are 0 or do not add up to 4 at each row"))


@pytest.mark.parametrize("tail", [0.0, -0.0, 9e-4, -1e-9, -np.inf])
def test_tail_at_the_end_of_its_range_is_read_as_finite_numbers(reader, url, tail):
    stores.change_values(url, "target", 1, tail=first_counted(tail))
    check(reader, url, {"shard 1": "", "dataset of losses": ""})
