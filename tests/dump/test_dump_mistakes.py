"""Invalid arguments of the dump job: refused with one line and status 2 before Ray starts or a model is loaded."""

from __future__ import annotations

import resource
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import logitstore
from logitstore.format.spec import LossSpec
from logitstore.storage.storage import Storage
from logitstore.store.writer import add_layer
from tests.helpers.paths import ROOT
from tests.helpers.tiny import make_model, make_tokenizer


def arguments(store, tiny, data, *more):
    return ["--store", str(store), "--target", tiny.target, "--data", data, "--max_length", "256",
            "--k", "16", "--num_proc", "1", *more]  # fmt: skip


def drawn(store, tiny, scheme, *more):
    return ["--store", store, "--target", tiny.target, "--data", tiny.data, "--scheme", scheme, *more]


@pytest.fixture(scope="module")
def job():
    """The job's main function in this process, without Ray: invalid arguments are found before Ray starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "jobs"))
        from logitstore.commands import dump as dump_command

        yield dump_command.run


def refused(job, capsys, *args):
    import ray

    with pytest.raises(SystemExit) as ended:
        job(list(args))
    shown = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2
    assert not ray.is_initialized()
    return shown[-1]


def test_invalid_arguments_are_refused_with_one_line_before_anything_is_loaded(job, capsys, tiny, tmp_path):
    fresh = str(tmp_path / "fresh.zarr")
    for args, message in (
        (arguments(fresh, tiny, tiny.data, "--k", "600"), "k must be at most the vocabulary size 512, got k=600"),
        (
            arguments(fresh, tiny, tiny.data, "--k", "64", "--shard_rows", str(2**22)),
            "entries of a row must be at most 16 in shards of 4194304 rows, got up to 64; give a smaller --k",
        ),
        (arguments(fresh, tiny, tiny.data, "--k", "abc"), "argument --k: invalid int value"),
        (arguments(fresh, tiny, tiny.data, "--k", "0"), "k must be between 1 and 65535, got k=0"),
        (
            arguments(fresh, tiny, tiny.data, "--mass", "0.9"),
            "mass needs --scheme nucleus, got mass=0.9 with --scheme topk; omit --mass",
        ),
        (
            arguments(fresh, tiny, tiny.data, "--scheme", "sample"),
            "k needs --scheme topk or --scheme nucleus, got k=16 with --scheme sample; omit --k",
        ),
        (
            arguments(fresh, tiny, tiny.data, "--seed", "1"),
            "seed needs --scheme sample or --scheme hybrid, got seed=1 with --scheme topk; omit --seed",
        ),
        (drawn(fresh, tiny, "sample", "--num_draws", "1"), "num_draws must be between 2 and 4096, got num_draws=1"),
        (drawn(fresh, tiny, "hybrid", "--seed", "-1"), "seed must be between 0 and 2**63 - 1, got seed=-1"),
        (
            drawn(fresh, tiny, "sample", "--num_draws", "65", "--shard_rows", str(2**20)),
            "entries of a row must be at most 64 in shards of 1048576 rows, got up to 65; give a smaller --k or",
        ),
        (arguments(fresh, tiny, tiny.data, "--scheme", "rank"), "argument --scheme: invalid choice: 'rank'"),
        (arguments(fresh, tiny, tiny.data, "--scheme", "nucleus", "--mass", "1.5"), "got mass=1.5"),
        (arguments(fresh, tiny, tiny.data, "--batch_tokens", "0"), "batch_tokens must be above 0, got batch_tokens=0"),
        (arguments(fresh, tiny, tiny.data, "--reference", "x"), "reference must be NAME=MODEL, got reference=x"),
        (arguments(fresh, tiny, tiny.data, "--reference", "../x=y"), "got name='../x'"),
        (arguments(fresh, tiny, tiny.data, "--reference", f"a={tiny.draft}", "--reference", "a=b"), "got a twice"),
        (arguments(fresh, tiny, tiny.data, "--reference", "a=/nowhere/model"), "got reference a=/nowhere/model ("),
        (arguments(fresh, tiny, "/nowhere/data.jsonl"), "/nowhere/data.jsonl"),
        (["--store", fresh], "target, reference or data must be given, got none of them"),
        (["--store", fresh, "--target", tiny.target, "--append"], "append needs --data, got"),
        (
            ["--store", fresh, "--data", tiny.data, "--append", "--reference", f"r={tiny.draft}"],
            "append with --reference needs --target, got none",
        ),
        (["--store", fresh, "--data", tiny.data], "data needs --target or --tokenizer, got"),
        (["--store", fresh, "--target", tiny.target], "got url=" + fresh),
        (["--store", "gs://bucket/x", "--target", tiny.target], "pip install gcsfs"),
        (["--store", fresh, "--target", tiny.target, "--storage_options", "no.json"], "got storage_options=no.json"),
        (arguments("", tiny, tiny.data), "url must be a folder or a URL, got url=''; "),
        (arguments(tiny.data, tiny, tiny.data), f"url must be a folder or a URL, got url={tiny.data}, which is a file"),
        (arguments(f"{tiny.data}/x", tiny, tiny.data), "url must be a folder that can be created, got url="),
        (
            arguments(Path(tiny.data).parent, tiny, tiny.data),
            f"got store={Path(tiny.data).parent}, which holds other files, such as draft; give another --store",
        ),
    ):
        assert message in refused(job, capsys, *args), args
    assert not Path(fresh).exists()


def test_full_disk_before_any_computation_is_reported_with_one_line(job, capsys, tiny, tmp_path):
    """A limit of the file size stands for a full disk."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**10, limit[1]))
    try:
        with pytest.raises(SystemExit) as ended:
            job(arguments(tmp_path / "fresh.zarr", tiny, tiny.data))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert ended.value.code == 1
    assert "File too large" in capsys.readouterr().err.strip().splitlines()[-1]


def test_store_made_with_other_options_is_refused(job, capsys, tiny, tiny_store, tmp_path):
    url = shutil.copytree(tiny_store, tmp_path / "c.zarr")
    before = {path: path.read_bytes() for path in url.rglob("*") if path.is_file()}
    for args, message in (
        (["--target", tiny.target, "--k", "8"], "target.model must be "),
        (["--tokenizer", tiny.target, "--data", tiny.data, "--max_length", "100"], "max_length must be 512 as in the"),
        (["--reference", f"reference={tiny.draft}"], "losses/reference.model must be "),
    ):
        assert message in refused(job, capsys, "--store", str(url), *args), args
    assert {path: path.read_bytes() for path in url.rglob("*") if path.is_file()} == before


def test_model_with_a_smaller_vocabulary_is_refused(job, capsys, tiny_store, tiny, tmp_path):
    small = make_model(tmp_path / "small", tiny.tokenizer, hidden=16, layers=1, vocab_size=500)
    line = refused(job, capsys, "--store", str(tiny_store), "--reference", f"small={small}")
    assert "reference small must have a vocabulary of at least 512" in line
    assert "got vocab_size=500" in line


def test_losses_before_the_target_is_finished_are_refused(job, capsys, tiny_store, tiny, tmp_path):
    url = shutil.copytree(tiny_store, tmp_path / "c.zarr")
    next((url / "commits/target").glob("000001-*.json")).unlink()
    line = refused(job, capsys, "--store", str(url), "--reference", f"late={tiny.reference}")
    assert "target must be complete before losses are added, got 1 of" in line


@pytest.fixture
def of_another_tokenizer(tmp_path):
    return make_model(tmp_path / "other", make_tokenizer(tmp_path / "tokenizer", vocab_size=500), hidden=16, layers=1)


def test_models_with_another_tokenizer_are_refused(job, capsys, tiny, tiny_store, tmp_path, of_another_tokenizer):
    url = shutil.copytree(tiny_store, tmp_path / "c.zarr")
    shutil.rmtree(url / "target")
    shutil.rmtree(url / "commits" / "target")
    for args, what in (
        (["--store", tiny_store, "--reference", f"r={of_another_tokenizer}"], "reference r"),
        (["--store", str(url), "--target", of_another_tokenizer], "target"),
        (["--store", str(tmp_path / "new"), "--data", tiny.data, "--tokenizer", tiny.tokenizer, "--max_length", "256",
          "--target", of_another_tokenizer], "target"),
    ):  # fmt: skip
        line = refused(job, capsys, *args)
        assert f"{what} must have the tokenizer of" in line
        assert f"got {what}={of_another_tokenizer} with another (500 tokens" in line
    assert not (tmp_path / "new").exists()


def test_max_length_above_the_context_of_a_model_is_refused(job, capsys, tiny, tmp_path):
    line = refused(job, capsys, *arguments(tmp_path / "c", tiny, tiny.data, "--max_length", "600"))
    assert f"max_length must be at most 512, the context of target={tiny.target}, got max_length=600" in line


def test_model_without_weights_is_refused_before_documents_are_written(job, capsys, tiny, tmp_path):
    shutil.copytree(tiny.target, tmp_path / "empty", ignore=shutil.ignore_patterns("*.safetensors"))
    args = ["--store", str(tmp_path / "c"), "--target", str(tmp_path / "empty"), "--data", tiny.data]
    line = refused(job, capsys, *args)
    assert f"target must have weights, got target={tmp_path / 'empty'}" in line
    assert not (tmp_path / "c").exists()


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no file here that nobody can read")
def test_unreadable_weights_are_reported_with_one_line(job, capsys, tiny, tmp_path):
    shutil.copytree(tiny.target, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "model" / "model.safetensors").symlink_to("/proc/self/mem")
    args = ["--store", str(tmp_path / "c"), "--target", str(tmp_path / "model"), "--data", tiny.data]
    line = refused(job, capsys, *args)
    assert f"target must have weights that can be read, got target={tmp_path / 'model'} ([Errno 5]" in line
    assert line.endswith("; check that its files are readable, or copy or download it again")
    assert not (tmp_path / "c").exists()


def test_target_without_a_tokenizer_is_named(job, capsys, tiny, tmp_path):
    folder = shutil.copytree(tiny.target, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    line = refused(job, capsys, "--store", str(tmp_path / "c"), "--target", str(folder), "--data", tiny.data)
    assert line.endswith(f"target must have a tokenizer, got target={folder}; save one there")


def test_empty_layer_can_be_started_again_with_another_model(tiny_store, tmp_path):
    url = shutil.copytree(tiny_store, tmp_path / "c.zarr")
    store, storage = logitstore.open(url), Storage(url)
    first, second = (
        LossSpec(model=replace(store.spec.losses["reference"].model, revision=revision)) for revision in "ab"
    )
    add_layer(storage, store.spec, "losses/new", first)
    add_layer(storage, store.spec, "losses/new", second)
    assert logitstore.open(url).spec.losses["new"] == second
    with pytest.raises(logitstore.IdentityError, match=r"losses/reference.model must be .* \(revision b\)"):
        add_layer(storage, store.spec, "losses/reference", second)
    assert logitstore.verify(logitstore.open(url)) == []


def test_default_max_length_is_the_context_of_the_target(tiny, tmp_path):
    from logitstore.commands import dump as dump_command

    args = dump_command.parser().parse_args(["--store", str(tmp_path / "c"), "--target", tiny.target])
    assert dump_command.choose_max_length(args, None) == 512
