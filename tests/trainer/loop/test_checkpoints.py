"""Checkpoints: only finished ones are used, even after a killed run; and copies of them at a URL."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from logitstore.errors import StorageError
from tests.helpers.faults import S3Server, s3_options
from tests.helpers.paths import HELPERS, environment
from tests.helpers.training import history, logged, same_weights, train, trained, with_dropout
from trainer.loop import checkpoints
from trainer.loop.remote_checkpoints import Remote


@pytest.fixture(scope="module")
def draft(tiny, tmp_path_factory):
    return with_dropout(tmp_path_factory.mktemp("draft") / "draft", tiny.draft)


@pytest.fixture(scope="module")
def whole(draft, tiny_store, tmp_path_factory):
    """A run of four steps with a checkpoint at each."""
    folder = tmp_path_factory.mktemp("run") / "whole"
    train(tiny_store, draft, folder, max_steps=4)
    return folder


def names(found):
    return [path.name for path in found]


@pytest.fixture
def copied(whole, tmp_path):
    """A folder with copies of the last two checkpoints."""
    for step in (3, 4):
        shutil.copytree(whole / f"checkpoint-{step}", tmp_path / "run" / f"checkpoint-{step}")
    return tmp_path / "run"


def test_checkpoint_with_a_missing_or_changed_file_is_not_used(copied):
    last = copied / "checkpoint-4"
    files = [path for path in last.rglob("*") if path.is_file()]
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= {
        path.name for path in files
    }
    assert names(checkpoints.finished(copied)) == ["checkpoint-3", "checkpoint-4"]
    for path in files:
        content = path.read_bytes()
        for other in (None, content[: len(content) // 2], b"", content + b" ", bytes([content[0] ^ 1]) + content[1:]):
            path.unlink()
            if other is not None:
                path.write_bytes(other)
            is_padded_record = path.name == checkpoints.RECORD and other == content + b" "  # this is the same JSON
            assert (checkpoints.defect(last) is None) == is_padded_record
            assert names(checkpoints.finished(copied)) == ["checkpoint-3"] + ["checkpoint-4"] * is_padded_record
            path.write_bytes(content)
    assert checkpoints.defect(last) is None


def test_run_resumes_from_the_last_intact_checkpoint(copied, whole, draft, tiny_store):
    (copied / "checkpoint-4" / "optimizer.pt").unlink()
    (last,) = checkpoints.finished(copied)
    train(tiny_store, draft, copied, max_steps=4, resume=last, save_total_limit=1)
    assert names(checkpoints.finished(copied)) == names(copied.glob("checkpoint-*")) == ["checkpoint-4"]
    assert same_weights(copied / "checkpoint-4", whole / "checkpoint-4")
    assert logged(history(copied / "checkpoint-4")) == logged(history(whole / "checkpoint-4"))
    assert trained(copied) == trained(whole, after=3)


def test_best_checkpoint_is_loaded_into_the_draft(whole, draft, tiny_store, tmp_path):
    trainer = train(tiny_store, draft, tmp_path / "out", max_steps=1, save_strategy="no")
    trainer.state.best_model_checkpoint = str(whole / "checkpoint-3")
    trainer._load_best_model()
    trainer.save_model(str(tmp_path / "best"))
    assert same_weights(tmp_path / "best", whole / "checkpoint-3")


def test_folders_without_a_valid_record_are_not_checkpoints(tmp_path):
    for name in ("checkpoint-", "checkpoint-x", "checkpoint-5", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-6").write_text("")
    assert checkpoints.finished(tmp_path) == []
    assert checkpoints.finished(tmp_path / "nowhere") == []
    for content in ("[]", "{}", '{"files": []}', "torn {", '{"files": {"a": 5}}'):
        (tmp_path / "checkpoint-5" / checkpoints.RECORD).write_text(content)
        assert checkpoints.defect(tmp_path / "checkpoint-5") is not None
    assert checkpoints.defect(tmp_path / "nowhere") == "it has no checkpoint.json, which is written last"


def make(folder, step, size=3):
    path = Path(folder, f"checkpoint-{step}")
    (path / "part").mkdir(parents=True)
    (path / "weights").write_bytes(bytes(size))
    (path / "part" / "state").write_text(str(step))
    checkpoints.write_record(path)
    return path


def test_rotation_deletes_the_oldest_and_unfinished_checkpoints(tmp_path):
    made = [make(tmp_path, step) for step in (2, 9, 10, 11)]
    (tmp_path / "checkpoint-7").mkdir()
    (made[1] / "weights").unlink()
    checkpoints.rotate(tmp_path, None, {made[3]})
    checkpoints.rotate(tmp_path, 0, {made[3]})
    assert len(list(tmp_path.iterdir())) == 5
    checkpoints.rotate(tmp_path, 3, {made[3]})
    assert names(checkpoints.finished(tmp_path)) == ["checkpoint-2", "checkpoint-10", "checkpoint-11"]
    assert len(list(tmp_path.iterdir())) == 3
    checkpoints.rotate(tmp_path, 1, {made[0], made[3]})  # keeps the best and the last
    assert names(checkpoints.finished(tmp_path)) == ["checkpoint-2", "checkpoint-11"]


def test_large_files_are_recorded_with_their_size_only(tmp_path):
    path = make(tmp_path, 1, size=checkpoints.DIGESTED_BYTES + 1)
    files = json.loads((path / checkpoints.RECORD).read_text())["files"]
    assert files["weights"] == {"bytes": checkpoints.DIGESTED_BYTES + 1, "sha256": None}
    assert len(files["part/state"]["sha256"]) == 64


def test_run_killed_while_writing_a_checkpoint_resumes_to_the_same_weights(draft, tiny_store, tmp_path):
    script = HELPERS / "killed_training.py"
    done = subprocess.run(
        [sys.executable, str(script), tiny_store, draft, str(tmp_path), "7"], capture_output=True, text=True,
        check=False, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) > 5
    for entry in found:
        assert entry["killed"], entry
        assert entry["same"], entry
        assert entry["left"] or entry["may_be_lost"], entry
    assert any(entry["left"] for entry in found)


@pytest.fixture(scope="module")
def bucket():
    with S3Server() as server:
        server.make_bucket("runs")
        yield "s3://runs/drafts/one", s3_options(server.url)


@pytest.fixture(params=["folder", "bucket"])
def remote(request, tmp_path):
    if request.param == "folder":
        return Remote(f"file://{tmp_path}/remote")
    url, options = request.getfixturevalue("bucket")
    return Remote(f"{url}/{request.node.name.partition('[')[0]}", options)


def test_checkpoint_is_uploaded_and_fetched_unchanged(remote, copied, draft, tiny_store, whole, tmp_path):
    assert remote.finished() == []
    for path in checkpoints.finished(copied):
        remote.upload(path)
    remote.upload(copied / "checkpoint-4")  # uploading again is allowed
    assert remote.finished() == ["checkpoint-3", "checkpoint-4"]
    (tmp_path / "local" / "checkpoint-3").mkdir(parents=True)
    fetched = remote.fetch("checkpoint-3", tmp_path / "local")
    assert fetched == tmp_path / "local" / "checkpoint-3"
    assert names(checkpoints.finished(tmp_path / "local")) == ["checkpoint-3"]
    train(tiny_store, draft, tmp_path / "local", resume=fetched, max_steps=4)
    assert same_weights(tmp_path / "local" / "checkpoint-4", whole / "checkpoint-4")
    remote.rotate(None, {"checkpoint-4"})
    assert remote.finished() == ["checkpoint-3", "checkpoint-4"]
    remote.rotate(1, {"checkpoint-4"})
    assert remote.finished() == ["checkpoint-4"]
    remote.remove("checkpoint-4")
    remote.remove("checkpoint-4")
    assert remote.finished() == []


def test_incomplete_remote_checkpoint_is_not_used(remote, copied, tmp_path):
    remote.upload(copied / "checkpoint-4")
    fs, root = remote._fs, remote._root
    fs.pipe_file(f"{root}/checkpoint-4/optimizer.pt", b"short")
    assert remote.finished() == []
    with pytest.raises(StorageError, match=r"checkpoint .*/checkpoint-4 is damaged: optimizer.pt does not match"):
        remote.fetch("checkpoint-4", tmp_path / "local")
    assert checkpoints.finished(tmp_path / "local") == []
    fs.rm_file(f"{root}/checkpoint-4/{checkpoints.RECORD}")
    assert remote.finished() == []
    fs.pipe_file(f"{root}/checkpoint-4/{checkpoints.RECORD}", b'{"files": {"optimizer.pt": 5}}')
    assert remote.finished() == []
    remote.upload(copied / "checkpoint-3")
    remote.rotate(2, {"checkpoint-3"})
    assert not fs.exists(f"{root}/checkpoint-4")  # rotation deletes the files of a killed upload
    remote.upload(copied / "checkpoint-4")
    assert remote.finished() == ["checkpoint-3", "checkpoint-4"]


def test_run_keeps_its_checkpoints_at_the_remote(remote, draft, tiny_store, tmp_path):
    train(tiny_store, draft, tmp_path / "out", max_steps=3, save_total_limit=2, remote=remote)
    assert remote.finished() == names(checkpoints.finished(tmp_path / "out")) == ["checkpoint-2", "checkpoint-3"]
