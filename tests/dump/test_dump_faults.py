"""The dump job with a real Ray cluster and a model that fails with documents, kills its actor, or loses its device."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import logitstore
from logitstore.dump import schedule
from logitstore.storage.storage import Storage
from logitstore.store.commits import set_aside
from logitstore.store.commits.index import find_commit
from logitstore.store.take_back import take_back
from tests.helpers import failing_models
from tests.helpers.dump_jobs import arguments, in_process, left_in_staging, payload, private_folders, records
from tests.helpers.dumped import edit_record
from tests.helpers.tiny import VOCAB_SIZE, functions, write_jsonl

LOADING = """
load, run = FailingForCausalLM.__init__, before


def __init__(self, config):
    folder = Path(config.failures).parent
    if (folder / "device is gone").exists():
        raise RuntimeError("the device is gone\\n\\tand will not come back")
    try:
        (folder / "one cannot load").unlink()  # only one process can
    except FileNotFoundError:
        load(self, config)
    else:
        raise RuntimeError("no room on this device")


def before(model, args, kwargs):
    if tokens_to(model, "die for ever", kwargs).any():
        time.sleep(1)  # until the other shard of this actor is written
        Path(model.config.failures).with_name("device is gone").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    run(model, args, kwargs)


FailingForCausalLM.__init__ = __init__
"""
"""Code that lets the failing model also fail to load: after it died, or in one process only."""


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The job's main function in this process."""
    with private_folders(tmp_path_factory.mktemp), in_process() as main:
        yield main


@pytest.fixture
def run(job, capfd, caplog):
    """Function that runs the job and returns its summary, its exit status, its stderr and its log."""
    from logitstore.commands.dump_summary import explain

    def run(*args):
        capfd.readouterr()
        caplog.clear()
        try:
            summary = job(list(args))
            status = explain(summary)
        except SystemExit as ended:
            summary, status = None, ended.code
        return SimpleNamespace(status=status, summary=summary, errors=capfd.readouterr().err, log=caplog.text)

    return run


@pytest.fixture(scope="module")
def failing(job, tiny, tmp_path_factory):
    """A model that can be made to fail, and the arguments of a job with it."""
    folder = tmp_path_factory.mktemp("failing") / "target"
    model = failing_models.make(folder, tiny.target)
    with (model / "modeling_failing.py").open("a") as code:
        code.write(LOADING)
    data = write_jsonl(folder / "data.jsonl", functions(30))
    models = SimpleNamespace(target=str(model))
    url = folder / "undisturbed.zarr"
    reference = ["--reference", f"ref={tiny.reference}"]
    make = lambda store, *more: arguments(store, models, data, "--trust_remote_code", *reference, *more)  # noqa: E731
    return SimpleNamespace(folder=folder, data=data, url=url, arguments=make, target=str(model), reference=reference)


@pytest.fixture(scope="module")
def undisturbed(job, failing):
    from logitstore.commands import dump as dump_command

    dump_command.run(failing.arguments(failing.url))
    store = logitstore.open(failing.url)
    assert store.num_shards >= 6
    return store


@pytest.fixture(autouse=True)
def healed(failing):
    yield
    failing_models.fail(failing.folder)
    (failing.folder / "device is gone").unlink(missing_ok=True)


def rare_tokens(store, num):
    """Returns up to `num` (token, document). Each token is in one document only, and each document in another shard."""
    documents = [set(store[i].ids.tolist()) for i in range(len(store))]
    counts = Counter(token for ids in documents for token in ids)
    found = {}
    for document, ids in enumerate(documents):
        shard = store.locate(document)[0]
        if rare := [token for token in sorted(ids) if counts[token] == 1]:
            found.setdefault(shard, (rare[0], document))
    return list(found.values())[:num]


def test_documents_are_set_aside_by_number_and_retried_with_the_flag(run, failing, undisturbed, tmp_path):
    url = tmp_path / "c.zarr"
    pairs = rare_tokens(undisturbed, 2)
    failing_models.fail(failing.folder, nan=[token for token, _ in pairs])
    documents = [document for _, document in pairs]
    shards = [undisturbed.locate(document)[0] for document in documents]
    first = run(*failing.arguments(url))
    assert first.status == 3
    assert first.summary["set_aside"]["shards"] == {}
    named = first.summary["set_aside"]["documents"]
    assert {layer: list(map(int, found)) for layer, found in named.items()} == {"target": documents}
    assert first.summary["documents_set_aside"] == {"target": len(documents)}
    for document in documents:
        assert f"set aside: document {document} of target: model must give finite numbers, got tail=nan" in first.errors
    assert first.errors.strip().splitlines()[-1] == (
        f"error: {len(documents)} documents were set aside, all others are done; run the same command with "
        "--retry_set_aside to try the documents again"
    )
    store = logitstore.open(url)
    assert logitstore.verify(store) == []
    before, whole = payload(url), payload(failing.url)
    differing = {int(path.rsplit("/", 1)[1]) for path, data in whole.items() if before[path] != data}
    assert differing == set(shards)
    for document in range(len(store)):
        assert store[document].loss_mask.any() == (document not in documents)

    # Without the flag the documents stay set aside, and are named again.
    again = run(*failing.arguments(url))
    assert (again.status, again.summary["shards_done"]) == (3, 0)
    assert again.summary["set_aside"] == first.summary["set_aside"]
    assert payload(url) == before

    # With the flag only they are tried again. The losses, which this run does not compute, are named as stale.
    failing_models.fail(failing.folder)
    target_alone = [arg for arg in failing.arguments(url, "--retry_set_aside") if arg not in failing.reference]
    retried = run(*target_alone)
    assert (retried.status, retried.summary["shards_done"]) == (0, len(shards))
    assert retried.summary["stale"] == {"losses/ref": shards}
    assert "give --reference ref=MODEL to compute them again" in retried.errors
    assert f"target: {len(shards)} shards with documents set aside are tried again" in retried.log

    last = run(*failing.arguments(url))
    assert (last.status, last.summary["shards_done"], last.summary["stale"]) == (0, len(shards), {})
    assert f"losses/ref: {len(shards)} stale shards are computed again" in last.log
    assert payload(url) == whole
    assert logitstore.verify(logitstore.open(url)) == []
    assert left_in_staging(url) == []


@pytest.mark.long
def test_shard_that_fails_repeatedly_is_set_aside_and_the_others_finish(run, failing, undisturbed, tmp_path):
    """One shard always kills its actor. The actor of another shard loses its device once."""
    url = tmp_path / "c.zarr"
    # The two shards are far apart: beside the first, the second would rarely be able to report its lost device.
    (deadly, where), *_, (unlucky, _) = rare_tokens(undisturbed, 5)
    shard = undisturbed.locate(where)[0]
    failing_models.fail(failing.folder, die=[deadly], lose_the_device=[unlucky])
    first = run(*failing.arguments(url))
    assert first.status == 3
    assert list(first.summary["set_aside"]["shards"]) == [str(shard)]
    assert first.summary["set_aside"]["documents"] == {}
    assert f"set aside: shard {shard}: its actor died" in first.errors
    assert "run the same command to try the shards again" in first.errors.strip().splitlines()[-1]
    assert "is tried again: AcceleratorError: CUDA error: device-side assert triggered" in first.log
    store = logitstore.open(url)
    for layer in ("target", "losses/ref"):
        assert store.layers[layer].missing == [shard]
        (entry,) = set_aside.read_set_aside(store.storage, layer).values()
        assert (entry.attempts, entry.reason[:14]) == (3, "its actor died")
    whole = payload(failing.url)
    assert payload(url) == {path: data for path, data in whole.items() if path.startswith("tokens")
                            or not path.endswith(f"/{shard}")}  # fmt: skip

    # The same command tries only this shard. A further failure does not stop the job, not even without a record of the
    # earlier failures, because no other shard is left.
    for layer in ("target", "losses/ref"):
        set_aside.clear(store.storage, layer, shard)
    written = {layer: records(url, layer) for layer in store.layers}
    times = {path: path.stat().st_mtime_ns for found in written.values() for path in found.values()}
    again = run(*failing.arguments(url))
    assert (again.status, again.summary["shards_done"]) == (3, 0)
    assert list(again.summary["set_aside"]["shards"]) == [str(shard)]

    failing_models.fail(failing.folder)
    last = run(*failing.arguments(url))
    assert (last.status, last.summary["shards_done"]) == (0, 1)
    assert last.summary["set_aside"] == {"shards": {}, "documents": {}}
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert payload(url) == whole
    assert not [path for path in (url / "set_aside").rglob("*") if path.is_file()]


def test_damaged_tokens_set_one_shard_aside_and_name_the_next_step(run, failing, undisturbed, tmp_path):
    url = Path(shutil.copytree(failing.url, tmp_path / "c.zarr"))
    for layer in ("target", "losses/ref"):
        records(url, layer)[2].unlink()
        records(url, layer)[3].unlink()
    (url / "tokens" / "ids" / "c" / "2").write_bytes(b"damaged")
    first = run(*failing.arguments(url))
    assert (first.status, first.summary["shards_done"]) == (3, 1)
    assert list(first.summary["set_aside"]["shards"]) == ["2"]
    assert "set aside: shard 2: layer 'tokens' is damaged: ids that cannot be decoded" in first.errors
    assert "`logitstore verify --repair` takes it back" in first.errors
    assert logitstore.open(url).layers["target"].missing == [2]


def test_only_stale_losses_are_replaced(run, failing, undisturbed, tmp_path):
    url = Path(shutil.copytree(failing.url, tmp_path / "c.zarr"))
    path = records(url, "losses/ref")[1]
    edit_record(path, computed_from="sha256:" + "5" * 64)
    path.rename(path.with_name(f"{path.name[:-17]}{'5' * 12}.json"))
    assert logitstore.open(url).layers["losses/ref"].stale == {1}
    staged = url / "staging" / "losses" / "ref" / "000003"
    staged.mkdir(parents=True)
    (staged / "left.ce").write_bytes(b"by a killed writer")
    times = {path: path.stat().st_mtime_ns for shard, path in records(url, "losses/ref").items() if shard != 1}
    first = run("--store", str(url), "--batch_tokens", "256", *failing.reference)
    assert (first.status, first.summary["shards_done"], first.summary["stale"]) == (0, 1, {})
    assert "losses/ref: 1 stale shards are computed again: 1" in first.log
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert find_commit(Storage(url), "losses/ref", 1).digest == undisturbed.reader.commit("losses/ref", 1).digest
    assert payload(url) == payload(failing.url)
    assert left_in_staging(url) == []


def test_appended_documents_are_dumped_for_all_layers(run, failing, undisturbed, tmp_path):
    url = Path(shutil.copytree(failing.url, tmp_path / "c.zarr"))
    more = write_jsonl(tmp_path / "more.jsonl", functions(36)[30:])
    opened, before = logitstore.open(url), payload(url)
    refused = run(*failing.arguments(url, "--data", more))
    assert (refused.status, refused.summary) == (2, None)
    assert "give --append to add them" in refused.errors
    first = run(*failing.arguments(url, "--data", more, "--append"))
    store = logitstore.open(url)
    assert first.status == 0
    assert first.summary["shards_done"] == store.num_shards - undisturbed.num_shards >= 1
    assert len(store) > len(undisturbed) == len(opened)
    assert not any(layer.missing for layer in store.layers.values())
    assert logitstore.verify(store) == []
    assert payload(url).items() >= before.items()
    assert np.isfinite(store.loss("ref")[len(store) - 1]).any()
    assert run(*failing.arguments(url, "--data", more, "--append")).summary["shards_done"] == 0


def test_model_that_always_returns_nan_stops_the_job_after_a_few_shards(run, failing, undisturbed, tmp_path):
    url = tmp_path / "c.zarr"
    failing_models.fail(failing.folder, nan=list(range(VOCAB_SIZE)))
    stopped = run(*failing.arguments(url))
    assert stopped.status == 1
    line = stopped.errors.strip().splitlines()[-1]
    reason = "model must score at least one document"
    assert line.startswith(f"error: all shards that were tried failed; the last error was: {reason}")
    assert list(set_aside.read_set_aside(Storage(url), "target")) == [0, 1, 2]


def test_invalid_weights_stop_the_job_with_one_line(run, failing, undisturbed, tiny, tmp_path):
    shutil.copytree(tiny.reference, tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"no weights")
    url = shutil.copytree(failing.url, tmp_path / "c.zarr")
    stopped = run("--store", str(url), "--reference", f"broken={tmp_path / 'broken'}")
    assert stopped.status == 1
    (line,) = [line for line in stopped.errors.splitlines() if line.startswith("error: ")]
    assert "no actor could load the models: " in line
    assert "Traceback" not in stopped.errors


def test_actor_that_cannot_load_its_models_does_not_stop_the_others(run, failing, undisturbed, tmp_path):
    url = shutil.copytree(failing.url, tmp_path / "c.zarr")
    shutil.rmtree(url / "commits" / "target")
    (failing.folder / "one cannot load").touch()
    first = run(*failing.arguments(url, "--num_actors", "2"))
    assert (first.status, first.summary["shards_done"]) == (0, undisturbed.num_shards)
    assert not (failing.folder / "one cannot load").exists()
    line = "an actor could not load the models; it is started again: RuntimeError: no room on this device"
    assert first.log.count(line) == 1
    assert payload(url) == payload(failing.url)


@pytest.mark.long
def test_job_ends_when_actors_can_no_longer_load_the_models(run, failing, undisturbed, tmp_path, monkeypatch):
    """The last shard, which an earlier run set aside, makes the device unusable."""
    monkeypatch.setattr(schedule, "MAX_IN_A_ROW", 3)
    url = Path(shutil.copytree(failing.url, tmp_path / "c.zarr"))
    deadly, where = rare_tokens(undisturbed, 5)[-1]
    shard = undisturbed.locate(where)[0]
    assert shard >= 4
    for number in range(shard + 1):
        records(url, "target")[number].unlink()
    set_aside.record(Storage(url), "target", shard, "its actor died", 3)
    failing_models.fail(failing.folder, die_for_ever=[deadly])
    stopped = run(*failing.arguments(url))
    assert stopped.status == 1
    reason = "RuntimeError: the device is gone and will not come back"
    assert f"an actor could not load the models; it is started again: {reason}" in stopped.log
    assert stopped.errors.strip().splitlines()[-1] == (
        f"error: no actor could load the models: {reason}. Fix the cause and run the same command again"
    )
    missing = logitstore.open(url).layers["target"].missing
    assert shard in missing
    assert len(missing) < shard


def test_shards_taken_back_during_the_job_are_named_and_computed_by_the_next(run, failing, undisturbed, tmp_path):
    """A repair takes back the rows of shard 0, and the losses of shard 1 become stale."""
    url = tmp_path / "c.zarr"
    counts = Counter(token for shard in undisturbed.shards() for token in set(shard.ids.tolist()))
    failing_models.fail(failing.folder, slow=[token for token, _ in counts.most_common(20)])

    def interfere():
        while not records(url, "losses/ref").keys() >= {0, 1}:
            time.sleep(0.01)
        path = records(url, "losses/ref")[1]
        edit_record(path, computed_from="sha256:" + "5" * 64)
        path.rename(path.with_name(f"{path.name[:-17]}{'5' * 12}.json"))
        take_back(Storage(url), "target", 0)

    other = threading.Thread(target=interfere, daemon=True)
    other.start()
    first = run(*failing.arguments(url))
    assert not other.is_alive()
    assert first.status == 3
    assert first.summary["set_aside"] == {"shards": {}, "documents": {}}
    assert (first.summary["missing"], first.summary["stale"]) == ({"target": [0]}, {"losses/ref": [1]})
    assert "note: target: shards 0 were taken back; run the same command again" in first.errors
    assert "note: losses/ref: shards 1 were computed from values that no longer exist; run" in first.errors
    assert first.errors.strip().splitlines()[-1] == (
        "error: another job or a repair took back 2 shards during the dump, or shards that they are computed from; "
        "run the same command again"
    )
    failing_models.fail(failing.folder)
    last = run(*failing.arguments(url))
    assert (last.status, last.summary["shards_done"]) == (0, 2)
    assert (last.summary["missing"], last.summary["stale"]) == ({}, {})
    assert payload(url) == payload(failing.url)


def test_many_documents_set_aside_are_counted_and_only_some_named(capfd):
    from logitstore.commands.dump_summary import explain

    documents = {"target": {str(i): f"because\n\x1b[31m{i}" for i in range(30)}}
    summary = {"layers": ["target"], "set_aside": {"shards": {}, "documents": documents},
               "documents_set_aside": {"target": 2000}, "stale": {}}  # fmt: skip
    assert explain(json.loads(json.dumps(summary))) == 3
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "set aside: document 0 of target: because [31m0"
    assert lines[20] == "set aside: and 1,980 more"
    assert lines[21].startswith("error: 2,000 documents were set aside")
    assert len(lines) == 22


def test_only_unfinished_shards_of_the_jobs_own_layers_give_status_3(capfd):
    from logitstore.commands.dump_summary import explain

    none = {"shards": {}, "documents": {}}
    summary = {"layers": ["target"], "set_aside": none, "stale": {"losses/ref": [1]}, "missing": {}}
    assert explain(summary) == 0
    assert explain(summary | {"missing": {"target": [2, 3]}}) == 3
    assert explain(summary | {"stale": {"target": [7]}}) == 3
    capfd.readouterr()
    failed = summary | {"set_aside": {"shards": {"7": "died"}, "documents": {}}, "stale": {"target": [7]}}
    assert explain(failed) == 3
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line == "error: 1 shards were set aside, all others are done; run the same command to try the shards again"
    assert explain(failed | {"missing": {"target": [2]}}) == 3
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "all others are done" not in " ".join(errors)
    assert len(errors) == 2
