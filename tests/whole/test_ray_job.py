"""The dump as a submitted job: a head node, and `ray job submit --working-dir .` from the checkout."""

from __future__ import annotations

import pytest

import logitstore
from tests.helpers.head_node import ROOT, head_node


@pytest.fixture(scope="module")
def cluster():
    with head_node(num_cpus=1) as node:
        yield node


def test_submitted_job_finishes_and_its_store_verifies(cluster, tiny, tmp_path):
    (ROOT / "build").mkdir(exist_ok=True)
    (ROOT / "build" / "not_uploaded").touch()
    url = tmp_path / "cache.zarr"
    job = cluster.submit(
        "python", "jobs/dump_logits.py", "--store", str(url), "--target", tiny.target, "--data", tiny.data,
        "--reference", f"ref={tiny.reference}", "--max_length", "256", "--shard_rows", "1024", "--k", "8", "--json",
    )  # fmt: skip
    assert job.returncode == 0, job.stdout + job.stderr
    assert '"shards": {}' in job.stdout
    store = logitstore.open(url)
    assert not any(layer.missing for layer in store.layers.values())
    assert logitstore.verify(store) == []
    (parent,) = set((cluster.folder / "ray").rglob("working_dir_files"))
    files = [path.relative_to(parent).parts[1:] for path in parent.rglob("*") if path.is_file()]
    tops = {parts[0] for parts in files if parts}
    assert {"jobs", "logitstore", "trainer", "pyproject.toml"} <= tops
    assert not tops & {".venv", ".git", "build"}


def test_submitted_job_with_invalid_arguments_fails_with_one_line(cluster, tiny, tmp_path):
    job = cluster.submit(
        "python", "jobs/dump_logits.py", "--store", str(tmp_path / "c"), "--target", tiny.target, "--data", "/no/data"
    )
    assert job.returncode == 1
    assert "got data=/no/data" in job.stdout
    assert "Traceback" not in job.stdout
