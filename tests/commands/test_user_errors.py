"""A command ends with one line, and a status that says whose fault it was."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from logitstore.cluster.resources import join_cluster
from logitstore.commands import export, fidelity
from trainer.commands import evaluate, train


@pytest.fixture
def damaged(tiny_store, tmp_path):
    """A store whose first target shard has a changed byte."""
    url = tmp_path / "damaged.zarr"
    shutil.copytree(tiny_store, url)
    for path in url.glob("target/*/c/0"):
        data = bytearray(path.read_bytes())
        data[len(data) // 3] ^= 1
        path.write_bytes(data)
    return str(url)


@pytest.mark.parametrize("name", ["export", "fidelity", "evaluate", "train"])
def test_damaged_store_ends_every_reader_with_one_line_and_status_1(name, damaged, tiny, tmp_path, capsys):
    run = {"export": export.main, "fidelity": fidelity.main, "evaluate": evaluate.main, "train": train.main}[name]
    out = str(tmp_path / "out")
    arguments = {
        "export": [damaged, "--shard", "0", "--out", out + ".npz"],
        "fidelity": [damaged],
        "evaluate": ["--store", damaged, "--draft", tiny.draft, "--no_progress"],
        "train": ["--store", damaged, "--draft", tiny.draft, "--output_dir", out, "--use_cpu", "true", "--no_progress"],
    }[name]
    assert run(arguments) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith("error: shard 0 of layer 'target' is damaged: ")
    assert "run `logitstore verify`" in errors[0]


@pytest.mark.parametrize("holds", ["is a file", "holds a store", "holds a model"])
def test_training_never_writes_into_something_else(holds, tiny, tiny_store, tmp_path, capsys):
    place = tmp_path / "place"
    if holds == "is a file":
        place.write_text("notes\n")
    elif holds == "holds a store":
        shutil.copytree(tiny_store, place)
    else:
        AutoModelForCausalLM.from_pretrained(tiny.draft).save_pretrained(place)
    before = {path: path.read_bytes() for path in [place, *place.rglob("*")] if path.is_file()}
    status = train.main(["--store", tiny_store, "--draft", tiny.draft, "--output_dir", str(place), "--use_cpu", "true"])
    assert status == 2
    assert f"which {holds}; give another --output_dir" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in [place, *Path(place).rglob("*")] if path.is_file()} == before


def test_address_without_a_ray_cluster_is_refused_by_name(monkeypatch):
    ray = pytest.importorskip("ray")

    def unreachable(**options):
        raise ConnectionError("Failed to connect to Ray cluster at 192.0.2.1:6379")

    # Ray itself retries for 25 seconds before it raises this error.
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", unreachable)
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    with pytest.raises(ValueError, match=r"RAY_ADDRESS must be .*, got RAY_ADDRESS=192\.0\.2\.1:6379 "):
        join_cluster()
