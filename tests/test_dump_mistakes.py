"""Mistakes in the dump job's arguments: one line, exit status 2, before Ray or any model is started."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from conftest import make_model

ROOT = Path(__file__).parent.parent


def arguments(store, tiny, data, *more):
    return ["--store", str(store), "--target", tiny.target, "--data", data, "--max_length", "256",
            "--k", "16", "--num_proc", "1", *more]  # fmt: skip


@pytest.fixture(scope="module")
def job():
    """The job's main, in this process: mistakes are found before Ray starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "jobs"))
        import dump_logits

        yield dump_logits.main


def refused(job, capsys, *args):
    import ray

    with pytest.raises(SystemExit) as ended:
        job(list(args))
    shown = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2
    assert not ray.is_initialized()
    return shown[-1]


def test_mistakes_are_one_line_before_anything_is_loaded(job, capsys, tiny, tmp_path):
    fresh = str(tmp_path / "fresh.zarr")
    for args, message in (
        (arguments(fresh, tiny, tiny.data, "--k", "600"), "k must be at most the vocabulary size 512, got k=600"),
        (arguments(fresh, tiny, tiny.data, "--k", "0"), "k must be between 1 and 65535, got k=0"),
        (arguments(fresh, tiny, tiny.data, "--mass", "0.9"), "mass must be left out, got mass=0.9 with --scheme topk"),
        (arguments(fresh, tiny, tiny.data, "--scheme", "nucleus", "--mass", "1.5"), "got mass=1.5"),
        (arguments(fresh, tiny, tiny.data, "--batch_tokens", "0"), "batch_tokens must be above 0, got batch_tokens=0"),
        (arguments(fresh, tiny, tiny.data, "--reference", "x"), "reference must be NAME=MODEL, got reference=x"),
        (arguments(fresh, tiny, tiny.data, "--reference", "../x=y"), "got name='../x'"),
        (arguments(fresh, tiny, tiny.data, "--reference", f"a={tiny.draft}", "--reference", "a=b"), "got a twice"),
        (arguments(fresh, tiny, tiny.data, "--reference", "a=/nowhere/model"), "got model=/nowhere/model"),
        (arguments(fresh, tiny, "/nowhere/data.jsonl"), "/nowhere/data.jsonl"),
        (["--store", fresh], "target must be given, got none"),
        (["--store", fresh, "--data", tiny.data], "tokenizer must be given"),
        (["--store", fresh, "--target", tiny.target], "got url=" + fresh),
        (["--store", "gs://bucket/x", "--target", tiny.target], "pip install gcsfs"),
        (["--store", fresh, "--target", tiny.target, "--storage_options", "no.json"], "got storage_options=no.json"),
    ):
        assert message in refused(job, capsys, *args), args
    assert not Path(fresh).exists()


def test_a_store_made_otherwise_is_refused(job, capsys, tiny, tiny_store, tmp_path):
    url = shutil.copytree(tiny_store, tmp_path / "c.zarr")
    before = {path: path.read_bytes() for path in url.rglob("*") if path.is_file()}
    for args, message in (
        (["--target", tiny.target, "--k", "8"], "target.model.revision must be '0' as in the store"),
        (["--target", tiny.target, "--data", tiny.data], "store.max_length must be 512 as in the store"),
        (["--reference", f"reference={tiny.draft}"], "losses/reference.model.revision must be '0'"),
    ):
        assert message in refused(job, capsys, "--store", str(url), *args), args
    assert {path: path.read_bytes() for path in url.rglob("*") if path.is_file()} == before


def test_a_model_of_a_smaller_vocabulary_is_refused(job, capsys, tiny_store, tiny, tmp_path):
    small = make_model(tmp_path / "small", tiny.tokenizer, hidden=16, layers=1, vocab_size=500)
    line = refused(job, capsys, "--store", str(tiny_store), "--reference", f"small={small}")
    assert "reference small must have a vocabulary of at least 512" in line
    assert "got vocab_size=500" in line


def test_losses_before_the_target_is_finished_are_refused(job, capsys, tiny_store, tiny, tmp_path):
    url = shutil.copytree(tiny_store, tmp_path / "c.zarr")
    os.unlink(url / "commits/target/000001.json")
    line = refused(job, capsys, "--store", str(url), "--reference", f"late={tiny.reference}")
    assert "target must be complete for losses, got 1 of" in line
