"""A short torture run, and tests that its checks detect errors. The long run is `python -m benchmarks.torture`."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from benchmarks import _torture_rows as rows
from benchmarks import torture as command
from benchmarks._torture_attack import TortureError, Totals, WriterRound
from benchmarks._torture_oracle import Verdict
from benchmarks._torture_ray import RayRound
from benchmarks._torture_run import make_oracles, torture
from logitstore.format import layout
from logitstore.format.commit import layer_digest
from logitstore.storage.storage import Storage
from logitstore.store.reader import Store
from logitstore.store.take_back import take_back
from logitstore.store.writer import LayerWriter

ROWS = [len(rows.tokens(shard)["ids"]) for shard in range(rows.NUM_SHARDS)]


@pytest.mark.long
def test_killed_writers_and_a_faulty_bucket_lose_double_or_mix_no_rows(tmp_path):
    totals = torture(tmp_path, minutes=0, seed=714, kinds=("local", "s3"), effort=0.3)
    assert totals.differences == []
    assert (totals.rows["lost"], totals.rows["doubled"], totals.rows["mixed"]) == (0, 0, 0)
    assert totals.rounds == {"local": 1, "s3": 1}
    assert totals.rows["compared"] >= 2 * 3 * sum(ROWS)
    assert totals.rows["read meanwhile"] > 0
    assert totals.kills["writer"] >= 3
    assert totals.faults.total() >= 50
    # In this round on the local disk, writers are only paused and not killed, so they leave no files behind.
    assert totals.events["writers stopped for a while"] > 0
    assert totals.events["stores looked at before sweeping"] == 1
    assert totals.events["documents appended to a store"] == 1


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The oracle of a run without an append, and its undisturbed stores, one for each variant."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return make_oracles(folder)[0], [folder / f"undisturbed-{variant}" for variant in range(rows.VARIANTS)]


@pytest.fixture
def url(undisturbed, tmp_path):
    """A finished store with variant 0 of the target's rows, which a test may damage."""
    return shutil.copytree(undisturbed[1][0], tmp_path / "cache.zarr")


def write_anew(url, layer, shard, arrays, computed_from):
    """Commits a shard again with other values."""
    storage = Storage(url)
    own = arrays if layer == "tokens" else rows.tokens(shard)
    take_back(storage, layer, shard)
    LayerWriter(storage, Store(storage).spec, layer).write(
        shard, arrays, documents=len(own["lengths"]), rows=len(own["ids"]), counted=int(own["loss_mask"].sum()),
        computed_from=computed_from, started=time.monotonic(),
    )  # fmt: skip


def test_shards_of_different_writers_are_accepted_if_each_is_of_one_writer(undisturbed, url):
    oracle, _ = undisturbed
    assert oracle.compare(url) == Verdict(rows=3 * sum(ROWS))
    own = rows.target(3, variant=1)
    write_anew(url, "target", 3, own, layer_digest("tokens", rows.tokens(3)))
    assert oracle.compare(url).lost == ROWS[3]  # the losses were computed from the old rows and are stale
    write_anew(url, rows.LOSSES, 3, rows.losses(own), layer_digest("target", own))
    assert oracle.compare(url) == Verdict(rows=3 * sum(ROWS))


def lose_a_commit(url, others):
    next(Path(url, "commits", "target").glob("000003-*")).unlink()
    # Losses cannot be read without the rows that they were computed from.
    return 2 * ROWS[3], 0, 0


def double_a_commit(url, others):
    other = next(Path(others[1], "commits", "target").glob("000003-*"))
    shutil.copy(other, Path(url, "commits", "target"))
    return 2 * ROWS[3], ROWS[3], 0


def put_another_writers_object_under_a_commit(url, others):
    shutil.copy(others[1] / "target/tail/c/2", Path(url, "target/tail/c/2"))
    return ROWS[2], 0, 0


def mix_rows_of_two_writers(url, others):
    one, other = rows.target(3, 0), rows.target(3, 1)
    mixed = one | {"tail": np.concatenate([one["tail"][:50], other["tail"][50:]])}
    write_anew(url, "target", 3, mixed, layer_digest("tokens", rows.tokens(3)))
    write_anew(url, rows.LOSSES, 3, rows.losses(mixed), layer_digest("target", mixed))
    num = int((rows.tokens(3)["loss_mask"][50:] == 1).sum())
    return 0, 0, 2 * num


def compute_losses_from_another_writers_rows(url, others):
    write_anew(url, rows.LOSSES, 3, rows.losses(rows.target(3, 0)) | {"ce": rows.losses(rows.target(3, 1))["ce"]},
               layer_digest("target", rows.target(3, 0)))  # fmt: skip
    return 0, 0, int(rows.tokens(3)["loss_mask"].sum())


@pytest.mark.parametrize("harm", [
    lose_a_commit, double_a_commit, put_another_writers_object_under_a_commit, mix_rows_of_two_writers,
    compute_losses_from_another_writers_rows,
])  # fmt: skip
def test_rows_that_are_lost_doubled_or_mixed_are_counted(undisturbed, url, harm):
    expected = harm(url, undisturbed[1])
    verdict = undisturbed[0].compare(url)
    assert (verdict.lost, verdict.doubled, verdict.mixed) == expected
    assert verdict.differences


def test_documents_that_replace_others_are_counted_as_doubled(undisturbed, url):
    write_anew(url, "tokens", 1, rows.tokens(0), None)
    verdict = undisturbed[0].compare(url)
    # The lost rows are those of the tokens and those of the target.
    assert (verdict.lost, verdict.doubled, verdict.mixed) == (2 * ROWS[1], ROWS[0], 0)


@pytest.mark.parametrize(("path", "data", "reason"), [
    ("staging/target/000003/0123.tail", b"x", "staging is not empty: staging/target/000003/0123.tail"),
    ("target/tail/c/99", b"x", "target/tail/c/99: should not be there"),
    ("zarr.json", None, "zarr.json: [0-9]+ bytes differ from the [0-9]+ that should be there"),
])  # fmt: skip
def test_files_that_belong_to_no_row_are_compared_too(undisturbed, url, path, data, reason):
    Path(url, path).parent.mkdir(parents=True, exist_ok=True)
    Path(url, path).write_bytes(Path(url, path).read_bytes() + b"\n" if data is None else data)
    (difference,) = undisturbed[0].compare(url).differences
    assert re.fullmatch(reason, difference)


def test_files_left_by_finished_writers_are_found_before_sweeping(url, tmp_path):
    one = WriterRound(url=str(url), options=None, direct=None, folder=tmp_path, oracles=(None, None), seed=0,
                      effort=1.0, totals=Totals(), quiet=None, tick=None)  # fmt: skip
    assert one._left() == []
    left = ["appends/000001.claim", "commits/target/000003.json.0123.partial", "staging/target/000003/0123.tail"]
    for path in left:
        Path(url, path).parent.mkdir(parents=True, exist_ok=True)
        Path(url, path).write_bytes(b"x")
    assert sorted(one._left()) == [f"left behind: {path}" for path in left]
    one._num_unfinished = 1  # a killed writer may leave files behind
    assert one._left() == []


@pytest.fixture
def ray_round(tmp_path):
    return RayRound(url=str(tmp_path), options=None, direct=None, folder=tmp_path, command=[], oracle=None, seed=0,
                    totals=Totals(), quiet=None, tick=lambda: None)  # fmt: skip


def test_job_may_set_shards_aside_only_after_a_kill_or_fault(ray_round, tmp_path):
    (tmp_path / "log").write_text("1 shard of target was set aside")
    job = SimpleNamespace(log=tmp_path / "log", kills=0, faults_before=0)
    with pytest.raises(TortureError, match="a job must end with 0, or say in one line why not, got 3"):
        ray_round._judge(job, 3)
    ray_round._totals.faults["reset"] += 1
    assert not ray_round._judge(job, 3)
    job.kills, job.faults_before = 1, 1
    assert not ray_round._judge(job, 3)


def test_processes_that_have_already_ended_are_not_counted_as_kills(ray_round):
    job = SimpleNamespace(driver=SimpleNamespace(pid=0), kills=0)
    with subprocess.Popen(["sleep", "60"]) as process:
        victim = psutil.Process(process.pid)
        for _ in range(2):
            ray_round._kill(job, victim)
            while victim.status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.001)
    ray_round._kill(job, victim)
    assert (job.kills, ray_round._totals.kills) == (1, {"other of a Ray": 1})


def test_table_counts_kills_by_kind():
    totals = Totals(kills=Counter(driver=1, actor=2, writer=1000))
    lines = [line.split() for line in command.table(totals, 1.0).splitlines()]
    assert lines[1:5] == [["kills", "1,003"], ["drivers", "1"], ["actors", "2"], ["writers", "1,000"]]


def test_run_with_a_difference_exits_with_status_1_and_keeps_the_store(tmp_path, monkeypatch, capsys):
    real = WriterRound.run

    def run(self):
        verdict = real(self)
        assert verdict.differences == []
        array = layout.layer_arrays("target")[0]
        Path(self._url, layout.object_path("target", array, 0)).unlink()
        return self._oracle.compare(self._url)

    monkeypatch.setattr(WriterRound, "run", run)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(SystemExit) as exit_:
        command.main(["--minutes", "0", "--kinds", "local", "--seed", "22"])
    assert exit_.value.code == 1
    said = capsys.readouterr().out
    (kept,) = tmp_path.glob("torture-*/round-0")
    assert re.search(rf"round 0 \(local, seed [0-9]+\) of seed 22 differs; see {kept}", said)
    assert re.search(r"^rows lost +[1-9]", said, re.MULTILINE)
    assert (kept / "cache.zarr" / "zarr.json").exists()
