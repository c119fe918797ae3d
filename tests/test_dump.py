"""The dump job on a real Ray: whole runs, killed runs, killed actors, mistakes."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import functions, write_jsonl

import logitstore

ROOT = Path(__file__).parent.parent
JOB = str(ROOT / "jobs" / "dump_logits.py")
SHARD_ROWS = 1024
MAX_LENGTH = 256


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Real text for some 25 small shards."""
    return write_jsonl(tmp_path_factory.mktemp("many") / "many.jsonl", functions(120))


@pytest.fixture(scope="module", autouse=True)
def private_caches(tmp_path_factory):
    """Nothing is looked up or left in the home folder; each job starts a Ray of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        patch.setenv("RAY_ADDRESS", "local")
        patch.setenv("TQDM_DISABLE", "1")
        yield


def arguments(store, tiny, data, *more):
    return ["--store", str(store), "--target", tiny.target, "--data", data, "--max_length", str(MAX_LENGTH),
            "--shard_rows", str(SHARD_ROWS), "--k", "12", "--num_proc", "1", "--num_actors", "1",
            "--cpus_per_actor", "1", "--batch_tokens", "256", *more]  # fmt: skip


def run_job(*args):
    return subprocess.run([sys.executable, JOB, *args], capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture(scope="module")
def job(private_caches):
    """The job's main in this process, on one Ray for the module."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "jobs"))
        import dump_logits

        ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False)
        yield dump_logits.main
        ray.shutdown()


@pytest.fixture(scope="module")
def undisturbed(job, tiny, many, tmp_path_factory):
    """A store made in one go, target and reference together."""
    url = tmp_path_factory.mktemp("undisturbed") / "cache.zarr"
    job(arguments(url, tiny, many, "--reference", f"ref={tiny.reference}"))
    return url


def payload(url):
    """Every byte of every array."""
    return {str(path.relative_to(url)): path.read_bytes() for path in sorted(Path(url).rglob("c/*"))}


def start_job(*args):
    return subprocess.Popen(
        [sys.executable, JOB, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def wait_for_commits(job, url, number, layer="target"):
    """Waits until some shards are committed, not all."""
    for _ in range(20_000):
        done = len(list(Path(url, "commits", layer).glob("*.json")))
        if done >= number:
            return done
        assert job.poll() is None, job.communicate()[1]
        time.sleep(0.005)
    raise TimeoutError(f"only {done} commits")


def test_a_finished_store_is_complete_and_not_computed_again(job, undisturbed, tiny, many):
    store = logitstore.open(undisturbed)
    assert sorted(store.layers) == ["losses/ref", "target", "tokens"]
    assert not any(layer.missing for layer in store.layers.values())
    assert store.spec.num_shards >= 10
    assert logitstore.verify(store) == []
    before = payload(undisturbed)
    summary = job(arguments(undisturbed, tiny, many, "--reference", f"ref={tiny.reference}"))
    assert payload(undisturbed) == before
    assert (summary["shards_done"], summary["shards_skipped"]) == (0, store.num_shards)
    assert summary["store_rows"] == store.num_rows


def test_losses_added_later_without_a_target_are_the_same(job, undisturbed, tiny, tmp_path):
    url = shutil.copytree(undisturbed, tmp_path / "cache.zarr")
    summary = job(["--store", str(url), "--reference", f"later={tiny.reference}", "--batch_tokens", "256"])
    assert summary["layers"] == ["losses/later"]
    store = logitstore.open(url)
    for document in (0, 7, len(store) - 1):
        np.testing.assert_array_equal(store.loss("later")[document], store.loss("ref")[document])
        gap = store.gap("later", "ref")[document]
        assert np.nanmax(np.abs(gap)) == 0


def test_each_actor_gets_a_shard_before_any_gets_two(job, tiny, tmp_path):
    data = write_jsonl(tmp_path / "two.jsonl", functions(9))
    args = arguments(tmp_path / "c.zarr", tiny, data)
    args[args.index("--num_actors") + 1] = "2"
    job(args)
    store = logitstore.open(tmp_path / "c.zarr")
    assert 2 <= store.num_shards <= 4
    assert len({store.commit("target", shard).writer for shard in range(store.num_shards)}) == 2


def test_a_killed_dump_goes_on_and_ends_as_if_never_killed(undisturbed, tiny, many, tmp_path):
    url = tmp_path / "cache.zarr"
    args = arguments(url, tiny, many, "--reference", f"ref={tiny.reference}")
    wanted = payload(undisturbed)
    job = start_job(*args)
    before = wait_for_commits(job, url, 3)
    family = [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]
    assert any("ShardDumper" in " ".join(member.cmdline()) for member in family)
    for member in family:  # driver, raylet, actors: no one is left to clean up
        with contextlib.suppress(psutil.NoSuchProcess):
            member.send_signal(signal.SIGKILL)
    job.communicate()
    seen = len(list(Path(url, "commits", "target").glob("*.json")))
    assert before <= seen < logitstore.open(url).spec.num_shards
    committed = {
        path: path.stat().st_mtime_ns
        for layer in ("tokens", "target", "losses/ref")
        for record in Path(url, "commits", layer).glob("*.json")
        for path in [record, *Path(url, layer).rglob(f"c/{int(record.stem)}")]
    }
    assert committed
    run = run_job(*args)
    assert run.returncode == 0, run.stderr
    assert {path: path.stat().st_mtime_ns for path in committed} == committed
    assert payload(url) == wanted
    assert logitstore.verify(logitstore.open(url)) == []


def test_an_actor_killed_in_mid_shard_does_not_fail_the_job(undisturbed, tiny, many, tmp_path):
    url = tmp_path / "cache.zarr"
    args = arguments(url, tiny, many, "--reference", f"ref={tiny.reference}")
    job = start_job(*args)
    wait_for_commits(job, url, 2)
    actors = [p for p in psutil.Process(job.pid).children(recursive=True) if "ShardDumper" in " ".join(p.cmdline())]
    assert len(actors) == 1
    actors[0].send_signal(signal.SIGKILL)
    output, errors = job.communicate(timeout=240)
    assert job.returncode == 0, errors
    assert "is tried again: its actor died" in errors
    assert json.loads(output[output.index("{") :])["set_aside"] == {}
    assert payload(url) == payload(undisturbed)


def test_a_shard_that_always_fails_is_set_aside_by_name(job, tiny, many, tmp_path):
    """A target that gives NaN for one rare token: the shards without that token are finished."""
    import torch
    from transformers import AutoModelForCausalLM

    shutil.copytree(tiny.target, tmp_path / "target")
    job(["--store", str(tmp_path / "c.zarr"), "--data", many, "--tokenizer", tiny.target, "--max_length",
         str(MAX_LENGTH), "--shard_rows", str(SHARD_ROWS), "--num_proc", "1"])  # fmt: skip
    store = logitstore.open(tmp_path / "c.zarr")
    held = [set(shard.ids.tolist()) for shard in store.shards()]
    rare = min(set().union(*held), key=lambda token: (sum(token in ids for ids in held), token))
    expected = sorted(shard for shard, ids in enumerate(held) if rare in ids)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    with torch.no_grad():
        model.get_input_embeddings().weight[rare] = float("nan")
    model.save_pretrained(tmp_path / "target")
    run = run_job("--store", str(tmp_path / "c.zarr"), "--target", str(tmp_path / "target"), "--k", "4")
    assert run.returncode == 3, run.stderr
    set_aside = json.loads(run.stdout)["set_aside"]
    assert sorted(map(int, set_aside)) == logitstore.open(tmp_path / "c.zarr").layers["target"].missing
    assert 0 < len(set_aside) <= len(expected)
    assert all("must give finite numbers" in reason for reason in set_aside.values())
    assert "run the same command again" in run.stderr
    assert logitstore.verify(logitstore.open(tmp_path / "c.zarr")) == []
