"""The fidelity budget of a dump, and the measurements shown by `logitstore fidelity` and `logitstore info`."""

from __future__ import annotations

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

import logitstore
from logitstore.commands import main as cli
from logitstore.errors import FidelityError
from logitstore.inspection import calibration_error, fidelity_report, info
from logitstore.inspection.measured import Measured
from logitstore.inspection.verify import places
from logitstore.storage.storage import Storage
from tests.helpers.dump_jobs import arguments, in_process, private_folders
from tests.helpers.dumped import record
from tests.helpers.measured import LAYERS, SCHEMES, dumper, emptied


@pytest.mark.parametrize("scheme", ["topk", "nucleus"])
def test_shard_above_the_budget_is_not_written(measured, tiny, tiny_store, tmp_path, scheme):
    sums = logitstore.open(measured[scheme]).reader.commit("target", 0).fidelity
    lost = (sums["kl_codes"] + sums["kl_tail"]) / sums["rows"]
    url = emptied(tiny_store, tmp_path / "cache.zarr", SCHEMES[scheme])
    message = rf"max_kl=\S+, but the {sums['rows']:.0f} measured rows of shard 0 lose {lost:.3g} on average"
    with pytest.raises(FidelityError, match=message):
        dumper(url, tiny, max_kl=0.99 * lost).dump(0, LAYERS)
    assert logitstore.open(url).layers["target"].missing == [0, 1, 2]
    assert not Storage(url).names("staging/target")
    dumper(url, tiny, max_kl=1.01 * lost).dump(0, LAYERS)
    assert logitstore.open(url).layers["target"].missing == [1, 2]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    with private_folders(tmp_path_factory.mktemp), in_process() as main:
        yield main


def test_dump_above_its_budget_stops_with_one_line(job, tiny, tmp_path, capfd):
    command = [*arguments(tmp_path / "c.zarr", tiny, tiny.data), "--no_progress"]
    with pytest.raises(SystemExit) as ended:
        job([*command, "--max_kl", "0.001"])
    assert ended.value.code == 1
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.search(
        r"max_kl must be at least the nats that a row loses when it is stored, got max_kl=0.001, but the \d\d measured "
        r"rows of shard \d+ lose 0\.\d+ on average \(kl_codes \+ kl_tail\); give a larger --max_kl, or start "
        r"another --store with a larger --k$",
        line,
    )
    assert not logitstore.open(tmp_path / "c.zarr").layers["target"].committed
    # The tokens are written, and the next step that the line names works.
    summary = job([*command, "--max_kl", "5"])
    assert summary["shards_done"] == logitstore.open(tmp_path / "c.zarr").num_shards


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "x", "--max_kl", "0"], "max_kl must be above 0 and finite, got max_kl=0.0"),
        (["--target", "x", "--max_kl", "nan"], "got max_kl=nan"),
        (
            ["--target", "x", "--scheme", "hybrid", "--max_kl", "1"],
            "max_kl needs --scheme topk or nucleus, got max_kl=1.0 with hybrid; omit --max_kl (on average, "
            "entries drawn at random lose nothing",
        ),
        (["--reference", "a=x", "--max_kl", "0.1"], "max_kl needs --target, got max_kl=0.1 without it; add"),
    ],
)
def test_invalid_budget_is_refused(tmp_path, capsys, options, message):
    from logitstore.commands import dump as dump_command

    with pytest.raises(SystemExit) as ended:
        dump_command.run(["--store", str(tmp_path / "c.zarr"), *options])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "c.zarr").exists()


def run(capsys, *args):
    status = cli.main(["fidelity", *map(str, args)])
    return SimpleNamespace(status=status, **dict(zip(("out", "err"), capsys.readouterr(), strict=True)))


def test_means_are_over_all_rows_of_all_shards(measured, capsys):
    store = logitstore.open(measured["sample"])
    facts = json.loads(run(capsys, measured["sample"], "--json").out)
    sums = [store.reader.commit("target", shard).fidelity for shard in range(3)]
    layer = facts["layers"]["target"]
    assert layer["rows"] == sum(s["rows"] for s in sums)
    for name, count in {"kl_codes": "rows", "tv_draws": "rows", "control_tv": "control_rows"}.items():
        expected = sum(s[name] for s in sums) / sum(s[count] for s in sums)
        assert layer["means"][name] == pytest.approx(expected, abs=1e-15)
    angles = [store.reader.commit("losses/reference", shard).fidelity["angle_shard"] for shard in range(3)]
    assert facts["layers"]["losses/reference"]["means"]["angle_shard"] == pytest.approx(np.mean(angles))
    rows = [store.read_shard(shard, layers=("target",)).rows for shard in range(3)]
    tails = np.concatenate([r.tail_mass[r.counts > 0] for r in rows]).astype(float)
    assert facts["kept_mass"]["rows"] == len(tails) == sum(facts["kept_mass"]["bins"]["rows"])
    assert facts["kept_mass"]["mean"] == pytest.approx(1 - tails.mean(), rel=1e-6)
    assert facts["kept_mass"]["percentile_1"] == pytest.approx(np.percentile(1 - tails, 1), rel=1e-6)


def test_table_shows_the_measurements(measured, capsys):
    found = run(capsys, measured["hybrid"])
    assert found.status == 0
    lines = [" ".join(line.split()) for line in found.out.splitlines()]
    assert lines[0].startswith(f"{measured['hybrid']}: hybrid, num_draws 20, seed 3; ")
    store = logitstore.open(measured["hybrid"])
    total = store.storage.num_bytes("target")
    assert f"bytes a counted row {total / store.num_counted:.2f}" in lines
    sums = [store.reader.commit("target", shard).fidelity for shard in range(3)]
    rows, again = (int(sum(s[name] for s in sums)) for name in ("rows", "control_rows"))
    assert f"target: measured on {rows} rows of 3 of 3 shards, {again} of them run twice" in lines
    kl, control = sum(s["kl_codes"] for s in sums) / rows, sum(s["control_kl"] for s in sums) / again
    assert f"KL of rounding to codes (kl_codes) {kl:.3g}" in lines
    assert f"KL of the target run twice (control_kl) {control:.3g}" in lines
    control_tv = sum(s["control_tv"] for s in sums) / again
    assert f"total variation, run twice (control_tv) {control_tv:.3g}" in lines
    assert any(line.startswith("angle of a shard's gradient (angle_shard)") for line in lines)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_table_shows_each_measurement_once_and_only_if_it_applies_to_the_scheme(measured, capsys, scheme):
    text = run(capsys, measured[scheme]).out
    lost, drawn = {"kl_tail", "kl_renormalised"}, {"tv_draws"}
    shown = {"kl_codes", "control_kl", "control_tv"} | (drawn if SCHEMES[scheme].draws else lost)
    for name in shown | lost | drawn:
        assert text.count(f"({name})") == (name in shown), name
    means = json.loads(run(capsys, measured[scheme], "--json").out)["layers"]["target"]["means"]
    assert shown | lost <= set(means)


def test_arrays_of_almost_no_bytes_have_no_line(measured):
    facts = fidelity_report.describe(logitstore.open(measured["topk"]))
    facts["bytes_per_row"] |= {"draws": 0.004, "tail": 0.005}
    names = [line.split()[0] for line in fidelity_report.render(facts) if line.endswith("%")]
    assert "draws" not in names
    assert "tail" in names


@pytest.mark.parametrize("scheme", ["topk", "nucleus"])
def test_calibration_is_computed_from_the_stored_rows(measured, capsys, scheme):
    sure, surer, right = [], [], []
    for document in logitstore.open(measured[scheme]):
        for i in np.flatnonzero(document.loss_mask):
            one = document.rows.slice(i, i + 1)
            probs = np.exp(one.logprobs.astype(float))
            sure.append(probs.max())
            surer.append(probs.max() / probs.sum())
            right.append(one.token_ids[probs.argmax()] == document.ids[i + 1])
    found = json.loads(run(capsys, measured[scheme], "--json").out)["calibration"]
    # Shards 0 and 2 of the three are read.
    assert 0 < found["rows"] < len(sure)
    measures_of = calibration_error.measure(logitstore.open(measured[scheme]), [0, 1, 2])
    assert measures_of["rows"] == len(sure)
    assert measures_of["accuracy"] == pytest.approx(np.mean(right))
    for name, values in (("ece", sure), ("ece_renormalised", surer)):
        expected = 0.0
        for low in range(15):
            inside = [i for i, value in enumerate(values) if low <= value * 15 < low + 1 or (low == 14 and value >= 1)]
            expected += abs(sum(right[i] - values[i] for i in inside)) / len(values)
        assert measures_of[name] == pytest.approx(expected, abs=1e-9)
    assert "calibration error of the likeliest (ece)" in run(capsys, measured[scheme]).out


def test_drawn_rows_have_no_calibration(measured, capsys):
    for scheme in ("sample", "hybrid"):
        assert json.loads(run(capsys, measured[scheme], "--json").out)["calibration"] == {"rows": 0}
        assert "ece" not in run(capsys, measured[scheme]).out


def test_calibration_error_compares_confidence_with_accuracy():
    sure = np.array([0.5, 0.5, 0.9, 1.0])
    expected = calibration_error.expected_calibration_error(sure, np.array([True, False, True, True]))
    assert expected == pytest.approx(0.025)
    assert calibration_error.expected_calibration_error(sure, np.zeros(4, dtype=bool)) == pytest.approx(sure.mean())


def test_sample_reads_fewer_records_and_damaged_ones_are_left_out(measured, tmp_path, capsys):
    facts = json.loads(run(capsys, measured["topk"], "--json", "--sample", "0.3", "--seed", "1").out)
    assert facts["layers"]["target"]["shards"] == 1
    url = shutil.copytree(measured["topk"], tmp_path / "cache.zarr")
    record(url, "losses/reference", 0).write_text("{")
    layer = json.loads(run(capsys, url, "--json").out)["layers"]["losses/reference"]
    assert (layer["shards"], layer["shards_measured"]) == (3, 2)
    assert run(capsys, url, "--sample", "0").err.startswith("error: sample must be above 0")


def test_only_the_sample_is_read_and_the_table_shows_its_size(measured, tmp_path, capsys):
    url = shutil.copytree(measured["topk"], tmp_path / "cache.zarr")
    chosen = dict(places(logitstore.open(url), 0.3, 1))
    for path in (url / "target").rglob("c/*"):
        if int(path.name) != chosen["target"]:
            path.write_bytes(b"")
    options = ["--sample", "0.3", "--seed", "1"]
    facts = json.loads(run(capsys, url, "--json", *options).out)
    counted = logitstore.open(url).reader.commit("target", chosen["target"]).counted
    assert facts["kept_mass"]["rows"] == facts["calibration"]["rows"] == counted
    text = " ".join(run(capsys, url, *options).out.split())
    rows = facts["layers"]["target"]["rows"]
    assert f"target: measured on {rows} rows of 1 of 3 shards, " in text
    assert f"losses/reference: measured on {facts['layers']['losses/reference']['rows']} rows of 1 of 3 shards" in text
    assert f" of {counted:,} rows in 1 of 3 shards kept mass, 1st" in text
    assert f" of {counted:,} rows in 1 of 3 shards, " in text
    damaged = run(capsys, url)  # without --sample the damaged shards are read
    assert (damaged.status, damaged.out) == (1, "")


def test_store_without_measurements_is_reported_as_such(tiny_store, capsys):
    found = run(capsys, tiny_store)
    assert found.status == 0
    assert "target: nothing was measured in 3 of 3 shards\n" in found.out
    assert (
        "losses/reference: nothing was measured in 3 of 3 shards, because the target did not run in the same dump\n"
        in found.out
    )
    assert "kept mass, mean" in found.out
    assert found.out.endswith("verdict: unknown, because no row was measured when the store was dumped\n")


def test_store_without_target_rows_is_refused(tiny_store, tmp_path, capsys):
    url = emptied(tiny_store, tmp_path / "cache.zarr", SCHEMES["topk"])
    found = run(capsys, url)
    assert found.status == 2
    assert found.err == f"error: store must have target rows, got {url} with none written yet; finish the dump\n"
    shutil.rmtree(url / "target")
    shutil.rmtree(url / "losses")
    found = run(capsys, url)
    assert found.status == 2
    assert found.err == f"error: store must have target rows, got {url} without any; dump the target first\n"


def test_info_shows_fidelity_in_one_line_per_layer_with_the_number_of_rows(measured, tiny_store, capsys, monkeypatch):
    assert cli.main(["info", str(measured["topk"])]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  fidelity ")]
    assert len(lines) == 2
    assert lines[0].startswith("  fidelity  KL ")
    assert lines[1].startswith("  fidelity  alpha 0.")
    store = logitstore.open(measured["topk"])
    for line, layer in zip(lines, LAYERS, strict=True):
        rows = sum(store.reader.commit(layer, shard).fidelity["rows"] for shard in range(3))
        assert line.endswith(f" ({rows:.0f} rows of 3 of 3 shards)")
    monkeypatch.setattr(info, "MEASURED_SHARDS", 2)
    rows = sum(store.reader.commit("target", shard).fidelity["rows"] for shard in (0, 2))
    assert cli.main(["info", str(measured["topk"])]) == 0
    assert f" ({rows:.0f} rows of 2 of 3 shards)\n" in capsys.readouterr().out
    assert cli.main(["info", str(tiny_store)]) == 0
    assert "fidelity" not in capsys.readouterr().out


def test_sums_without_rows_have_no_means():
    assert Measured(shards=0, sums={}).means() == {}
    assert Measured(shards=1, sums={"rows": 2, "mass": 1.5, "control_rows": 0, "control_kl": 0.0}).means() == {
        "mass": 0.75
    }


@pytest.mark.parametrize("scheme", ["topk", "nucleus", "sample", "hybrid"])
def test_verdict_says_whether_rows_are_biased(scheme, measured, capsys):
    line = run(capsys, measured[scheme]).out.splitlines()[-1]
    means = json.loads(run(capsys, measured[scheme], "--json").out)["layers"]["target"]["means"]
    kind = "unbiased" if scheme in ("sample", "hybrid") else "biased by truncation"
    assert line.startswith(f"verdict: {kind}. ")
    shown = f"{means['tv_draws']:.2f}" if scheme in ("sample", "hybrid") else f"{means['kl_tail']:.2g} nats a row"
    assert shown in line


def test_verdict_on_a_small_loss_names_it_and_asks_for_nothing():
    text = fidelity_report.verdict({"kl_codes": 2e-5, "kl_tail": 0.004, "mass": 0.995}, is_drawn=False)
    assert text == (
        "close to the target. 0.004 nats a row are lost within the tail, which holds 0.5% of the mass; "
        "rounding loses 2e-05 nats a row."
    )
