"""`logitstore verify` and `info` on stores with unfinished or given-up appends, and on a store being written."""

from __future__ import annotations

import json
import shutil
import threading

import pytest

import logitstore
from logitstore.commands import main as cli
from logitstore.errors import FormatError, IdentityError
from logitstore.storage.storage import Storage
from logitstore.store.commits import protocol
from logitstore.store.reader import Store
from tests.helpers.dumped import (
    LAYERS,
    add_layers,
    contents,
    documents,
    make_dumper,
    prepare_tokens,
    record,
    write_data,
)


@pytest.fixture(scope="module")
def more(made, tmp_path_factory):
    """Documents for an append of two shards."""
    return write_data(tmp_path_factory.mktemp("more") / "more.jsonl", documents(made.tokenizer, 5, 9))


@pytest.fixture(scope="module")
def other(made, tmp_path_factory):
    """Other documents for an append."""
    return write_data(tmp_path_factory.mktemp("other") / "other.jsonl", documents(made.tokenizer, 9, 13))


@pytest.fixture
def url(made, tmp_path):
    return shutil.copytree(made.url, tmp_path / "cache.zarr")


def found(url):
    return [str(problem) for problem in logitstore.verify(Store(Storage(url)))]


def verify(url, *options):
    return cli.main(["verify", *options, str(url)])


@pytest.fixture
def half(url, made, more, monkeypatch):
    """A store with an unfinished append: its job was killed while it published the second shard."""
    real = protocol.publish
    num = []

    def killed(storage, commit, objects):
        num.append(commit.shard)
        if len(num) == 2:
            monkeypatch.setattr(protocol, "_copy", lambda *_: 1 / 0)
        return real(storage, commit, objects)

    with monkeypatch.context() as patch:
        patch.setattr(protocol, "publish", killed)
        with pytest.raises(ZeroDivisionError):
            prepare_tokens(url, made, more, append=True)
    monkeypatch.undo()
    assert list(url.glob("staging/tokens/000005/winner*"))
    return url


def test_unfinished_append_is_shown_and_is_not_damage(half, more, capsys):
    for command in ("info", "verify"):
        assert cli.main([command, str(half)]) == 0
        assert f"append 1: under way, or left unfinished ({more}: 1 of 2 shards so far)" in capsys.readouterr().out
    assert cli.main(["info", "--json", str(half)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["shards"], facts["appends"], facts["unfinished_append"]["shards_done"]) == (4, [], 1)


def test_repair_gives_up_an_unfinished_append_and_another_can_follow(half, made, more, other, tmp_path, capsys):
    with pytest.raises(IdentityError, match="is running or was left unfinished, so"):
        prepare_tokens(half, made, other, append=True)
    assert verify(half, "--repair") == 0
    assert f"repaired: append of {more}: given up" in capsys.readouterr().out
    store = prepare_tokens(half, made, other, append=True)
    fresh = shutil.copytree(made.url, tmp_path / "fresh.zarr")
    prepare_tokens(fresh, made, other, append=True)
    assert contents(half) == contents(fresh)
    assert store.num_documents == logitstore.open(fresh).num_documents
    assert found(half) == []


def test_append_with_an_unreadable_claim_is_shown_and_given_up(half, capsys):
    (half / "appends/000001.claim").write_text("{")
    for command in ("info", "verify"):
        assert cli.main([command, str(half)]) == 0
        assert (
            "append 1: under way, or left unfinished, but its claim cannot be read; `logitstore"
            in capsys.readouterr().out
        )
    assert verify(half, "--repair") == 0
    assert not [*half.rglob("*.claim"), *half.glob("commits/tokens/000004-*"), *half.glob("staging/tokens/*")]


def test_shards_without_their_append_record_are_reported(url, made, more, other):
    prepare_tokens(url, made, more, append=True)
    whole = contents(url)
    (url / "appends/000001.json").rename(url / "appends/000002.json")
    with pytest.raises(FormatError, match="ends before shard 4, but 2 committed shards of tokens lie after its end"):
        logitstore.open(url)
    stray, beyond = found(url)
    assert beyond.startswith(
        "tokens: shards 4-5 are committed, but the store ends before shard 4: zarr.json was changed, or a file in app"
    )
    assert stray.startswith("tokens: appends/000002.json exists, but the append before it is missing")
    assert verify(url, "--repair") == 1
    (url / "appends/000002.json").unlink()
    before = contents(url)
    with pytest.raises(
        IdentityError,
        match=r"shard 4 after the end of the store must hold .* [0-9a-f]{12}., got .* [0-9a-f]{12} .* missing, rest",
    ):
        prepare_tokens(url, made, other, append=True)
    (url / "appends/000001.claim").unlink()
    assert contents(url) == before
    prepare_tokens(url, made, more, append=True)  # the same documents restore the append
    assert contents(url) == whole


def test_published_shards_are_not_deleted_when_an_append_is_given_up(url, made, more, other):
    prepare_tokens(url, made, more, append=True)
    add_layers(url, made)
    make_dumper(url, made).dump(4, LAYERS[1:])
    record = (url / "appends/000001.json").read_bytes()
    (url / "appends/000001.json").unlink()
    with pytest.raises(IdentityError, match="If a file in appends/ is missing, restore it"):
        prepare_tokens(url, made, other, append=True)
    assert verify(url, "--repair") == 0
    assert not list(url.glob("appends/*"))
    assert [problem.partition(" are")[0] for problem in found(url)] == [f"{layer}: shards 4" for layer in LAYERS]
    (url / "appends/000001.json").write_bytes(record)
    assert found(url) == []
    prepare_tokens(url, made, more)
    assert (logitstore.open(url).num_shards, found(url)) == (6, [])


def test_files_of_a_late_append_beyond_the_store_are_removed_by_one_repair(url, made, more, other, tmp_path, capsys):
    """An older version can leave such files, if it started to append after another append was published."""
    late = shutil.copytree(url, tmp_path / "late.zarr")
    write_data(tmp_path / "long.jsonl", documents(made.tokenizer, 9, 16))
    prepare_tokens(late, made, str(tmp_path / "long.jsonl"), append=True)
    assert logitstore.open(late).num_shards > 6
    prepare_tokens(url, made, more, append=True)
    whole = contents(url)
    shutil.copy(late / "appends/000001.json", url / "appends/000001.claim")
    shutil.copy(record(late, "tokens", 6), url / "commits/tokens")
    for array in ("ids", "loss_mask", "lengths", "digests"):
        shutil.copy(late / f"tokens/{array}/c/6", url / f"tokens/{array}/c/6")
    verify(url, "--repair")
    assert f"repaired: append of {tmp_path / 'long.jsonl'}: given up" in capsys.readouterr().out
    assert found(url) == []
    assert {path for path in contents(url) if path not in whole} == {
        f"tokens/{array}/c/6" for array in ("ids", "loss_mask", "lengths", "digests")
    }
    prepare_tokens(url, made, other, append=True)


def test_store_is_opened_described_and_verified_while_it_is_written(made, more, tmp_path, capsys):
    url = tmp_path / "cache.zarr"
    done = threading.Event()
    failures = []

    def write():
        try:
            prepare_tokens(url, made)
            add_layers(url, made)
            dumper = make_dumper(url, made)
            for shard in range(4):
                dumper.dump(shard, LAYERS[1:])
            prepare_tokens(url, made, more, append=True)
            add_layers(url, made)
            for shard in range(4, logitstore.open(url).num_shards):
                dumper.dump(shard, LAYERS[1:])
        except BaseException as error:
            failures.append(error)
            raise
        finally:
            done.set()

    thread = threading.Thread(target=write)
    thread.start()
    seen = []
    try:
        while not (url / "zarr.json").exists():
            done.wait(0.001)
        while not done.is_set():
            store = logitstore.open(url)
            seen.append((store.num_shards, *(len(layer.index) for layer in store.layers.values())))
            problems = logitstore.verify(store)
            assert problems == [], [str(problem) for problem in problems]
            assert cli.main(["info", str(url)]) == 0
    finally:
        thread.join()
    assert failures == []
    assert len(set(seen)) > 3
    assert verify(url) == 0
