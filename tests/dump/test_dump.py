"""The dump job with a real Ray cluster: complete runs, killed runs, killed actors."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

import logitstore
from logitstore.format.schemes import make_scheme
from tests.helpers.dump_jobs import arguments, in_process, left_in_staging, payload, private_folders, records, start_job
from tests.helpers.tiny import functions, write_jsonl


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Real text for about 25 small shards."""
    return write_jsonl(tmp_path_factory.mktemp("many") / "many.jsonl", functions(120))


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The job's main function in this process, with one Ray cluster for the module."""
    with private_folders(tmp_path_factory.mktemp), in_process() as main:
        yield main


@pytest.fixture(scope="module")
def undisturbed(job, tiny, many, tmp_path_factory):
    """A store made in one run, with target and reference together."""
    url = tmp_path_factory.mktemp("undisturbed") / "cache.zarr"
    job(arguments(url, tiny, many, "--reference", f"ref={tiny.reference}"))
    return url


def run_job(*args):
    job = start_job(*args)
    output, errors = job.communicate(timeout=240)
    return job.returncode, output, errors


def wait_for_commits(job, url, number, layer="target"):
    """Waits until `number` shards of a layer are committed. Returns how many are."""
    for _ in range(20_000):
        done = len(list(Path(url, "commits", layer).glob("*.json")))
        if done >= number:
            return done
        assert job.poll() is None, job.communicate()[1]
        time.sleep(0.005)
    raise TimeoutError(f"only {done} commits")


def test_finished_store_is_complete_and_not_computed_again(job, undisturbed, tiny, many):
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


def test_losses_added_without_the_target_equal_those_dumped_with_it(job, undisturbed, tiny, tmp_path):
    url = shutil.copytree(undisturbed, tmp_path / "cache.zarr")
    summary = job(["--store", str(url), "--reference", f"later={tiny.reference}", "--batch_tokens", "256"])
    assert summary["layers"] == ["losses/later"]
    store = logitstore.open(url)
    for document in (0, 7, len(store) - 1):
        np.testing.assert_array_equal(store.loss("later")[document], store.loss("ref")[document])
        gap = store.gap("later", "ref")[document]
        assert np.nanmax(np.abs(gap)) == 0


@pytest.mark.parametrize("name", ["sample", "hybrid"])
def test_draws_depend_only_on_the_seed_and_the_shard(job, tiny, tmp_path, capsys, name):
    """They do not depend on the number of actors or on the order in which actors take shards."""
    few = ["--target", tiny.target, "--data", tiny.data, "--max_length", "128", "--shard_rows", "512", "--num_proc",
           "1", "--cpus_per_actor", "1", "--batch_tokens", "256", "--scheme", name, "--num_draws", "8"]  # fmt: skip
    urls = [str(tmp_path / f"{num}.zarr") for num in (1, 2)]
    for num, url in enumerate(urls, 1):
        job(["--store", url, *few, "--seed", "3", "--num_actors", str(num)])
    assert payload(urls[0]) == payload(urls[1])
    store = logitstore.open(urls[0])
    assert store.spec.target.scheme == make_scheme(name, {"num_draws": 8, "seed": 3})
    assert logitstore.verify(store) == []
    shards = list(store.shards())
    assert len(shards) > 3
    for shard in shards:
        assert 0 < shard.rows.counts.max() <= store.spec.target.room
        np.testing.assert_allclose(shard.rows.weights.sum() / shard.loss_mask.sum(), 1.0, atol=0.05)
    # The store cannot be continued with another seed.
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        job(["--store", urls[0], *few, "--seed", "4"])
    assert ended.value.code == 2
    assert "seed 3 as in the store, got " in capsys.readouterr().err


@pytest.mark.long
def test_killed_dump_continues_to_the_same_store(undisturbed, tiny, many, tmp_path):
    url = tmp_path / "cache.zarr"
    args = arguments(url, tiny, many, "--reference", f"ref={tiny.reference}")
    wanted = payload(undisturbed)
    job = start_job(*args)
    before = wait_for_commits(job, url, 3)
    family = [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]
    assert any("ShardDumper" in " ".join(member.cmdline()) for member in family)
    for member in family:  # driver, raylet and actors, so that no process is left to clean up
        with contextlib.suppress(psutil.NoSuchProcess):
            member.send_signal(signal.SIGKILL)
    job.communicate()
    seen = len(list(Path(url, "commits", "target").glob("*.json")))
    assert before <= seen < logitstore.open(url).spec.num_shards
    committed = {
        path: path.stat().st_mtime_ns
        for layer in ("tokens", "target", "losses/ref")
        for shard, record in records(url, layer).items()
        for path in [record, *Path(url, layer).rglob(f"c/{shard}")]
    }
    assert committed
    status, _, errors = run_job(*args)
    assert status == 0, errors
    assert {path: path.stat().st_mtime_ns for path in committed} == committed
    assert payload(url) == wanted
    assert logitstore.verify(logitstore.open(url)) == []
    assert left_in_staging(url) == []


@pytest.mark.long
def test_killed_actor_does_not_fail_the_job(undisturbed, tiny, many, tmp_path):
    url = tmp_path / "cache.zarr"
    args = arguments(url, tiny, many, "--reference", f"ref={tiny.reference}", "--json")
    job = start_job(*args)
    wait_for_commits(job, url, 2)
    actors = [p for p in psutil.Process(job.pid).children(recursive=True) if "ShardDumper" in " ".join(p.cmdline())]
    assert len(actors) == 1
    actors[0].send_signal(signal.SIGKILL)
    output, errors = job.communicate(timeout=240)
    assert job.returncode == 0, errors
    assert "is tried again: its actor died" in errors
    assert json.loads(output[output.index("{") :])["set_aside"] == {"shards": {}, "documents": {}}
    assert payload(url) == payload(undisturbed)
