"""Export of shards as dense NumPy arrays, which can be read without logitstore."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest

import logitstore
from logitstore.commands import main as cli


@pytest.fixture(scope="module")
def drawn(made):
    """URL of a store with drawn rows."""
    return made.url


def exported(url, shard, tmp_path, capsys):
    out = tmp_path / "shard.npz"
    assert cli.main(["export", str(url), "--shard", str(shard), "--out", str(out), "--overwrite"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["shard.npz"]
    with np.load(out, allow_pickle=False) as file:
        return dict(file), capsys.readouterr().out


@pytest.mark.parametrize("which", ["truncated", "drawn"])
def test_exported_arrays_have_all_values_of_the_shard(which, tiny_store, drawn, tmp_path, capsys):
    url = tiny_store if which == "truncated" else drawn
    arrays, _ = exported(url, 1, tmp_path, capsys)
    shard = logitstore.open(url).read_shard(1)
    for name, wanted in (("ids", shard.ids), ("loss_mask", shard.loss_mask), ("lengths", shard.lengths)):
        np.testing.assert_array_equal(arrays[name], wanted)
    rows = shard.rows
    for name in ("tail_mass", "label_logprob", "entropy"):
        assert arrays[name].dtype == np.float32
        np.testing.assert_array_equal(arrays[name], getattr(rows, name))
    assert ("weights" in arrays) == (which == "drawn")
    width = int(rows.counts.max())
    for i in range(len(rows)):
        row, n = rows.slice(i, i + 1), int(rows.counts[i])
        assert arrays["counts"][i] == n
        np.testing.assert_array_equal(arrays["token_ids"][i], [*row.token_ids, *[0] * (width - n)])
        np.testing.assert_allclose(arrays["probs"][i, :n], np.exp(row.logprobs), rtol=1e-6)
        assert (arrays["probs"][i, n:] == 0).all()
        if which == "drawn":
            np.testing.assert_array_equal(arrays["weights"][i], [*row.weights, *[0] * (width - n)])


def test_export_prints_the_arrays_in_the_file(tiny_store, tmp_path, capsys):
    arrays, text = exported(tiny_store, 0, tmp_path, capsys)
    assert [line.split()[0] for line in text.splitlines()] == list(arrays)
    num_rows = len(arrays["ids"])
    assert f"token_ids     uint32   [{num_rows}, 16]\n" in text
    assert f"probs         float32  [{num_rows}, 16]\n" in text


def test_exported_tail_is_the_mass_and_is_named_tail_mass(tiny_store, tmp_path, capsys):
    arrays, _ = exported(tiny_store, 0, tmp_path, capsys)
    assert "tail" not in arrays  # in a store, `tail` is the log of the mass
    counted = arrays["loss_mask"]
    whole = arrays["probs"].sum(1, dtype=np.float64) + arrays["tail_mass"]
    np.testing.assert_allclose(whole[counted], 1, atol=1e-3)


def savez_before_numpy_2_2(file, **arrays):
    """Acts like np.savez of NumPy 2.0 and 2.1, which saves every keyword argument as an array."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, np.asanyarray(array))


def test_exported_file_has_only_the_arrays_with_older_numpy(tiny_store, tmp_path, capsys, monkeypatch):
    wanted, said = exported(tiny_store, 0, tmp_path, capsys)
    monkeypatch.setattr(np, "savez", savez_before_numpy_2_2)
    arrays, text = exported(tiny_store, 0, tmp_path, capsys)
    assert (list(arrays), text) == (list(wanted), said)
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, wanted[name])


@pytest.mark.parametrize(
    ("shard", "out", "message"),
    [
        (3, "{folder}/x.npz", "shard must be at least 0 and below 3, got shard=3;"),
        (-1, "{folder}/x.npz", "shard must be at least 0 and below 3, got shard=-1;"),
        (0, "{folder}/x.npy", "out must be a file name that ends in .npz, got out="),
        (0, "{folder}/no/x.npz", "out must be in a folder that exists, got out="),
    ],
)
def test_invalid_export_arguments_are_refused_with_one_line(tiny_store, tmp_path, capsys, shard, out, message):
    argv = ["export", tiny_store, "--shard", str(shard), "--out", out.format(folder=tmp_path)]
    assert cli.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")
    assert list(tmp_path.iterdir()) == []


def test_unwritable_output_file_is_refused_with_one_line(tiny_store, tmp_path, capsys):
    (tmp_path / "x.npz").mkdir()
    assert cli.main(["export", tiny_store, "--shard", "0", "--out", str(tmp_path / "x.npz"), "--overwrite"]) == 2
    assert "error: out must be a file that can be written, got out=" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]


def test_export_of_a_store_without_a_target_is_refused(tiny_store, tmp_path, capsys):
    from tests.helpers import stores

    stores.copy(tiny_store, tmp_path / "cache.zarr")
    (tmp_path / "cache.zarr" / "target" / "zarr.json").unlink()
    argv = ["export", str(tmp_path / "cache.zarr"), "--shard", "0", "--out", str(tmp_path / "x.npz")]
    assert cli.main(argv) == 2
    assert "error: layer must be one of ['tokens', 'losses/reference'] in " in capsys.readouterr().err


def test_existing_file_is_overwritten_only_with_the_flag(tiny_store, tmp_path, capsys):
    out = tmp_path / "x.npz"
    out.write_text("mine")
    assert cli.main(["export", tiny_store, "--shard", "0", "--out", str(out)]) == 2
    assert f"error: out must be a new file, got out={out}, which exists; give another" in capsys.readouterr().err
    assert out.read_text() == "mine"
