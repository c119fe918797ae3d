"""Writers of one shard with failures other than kills: late requests, damaged staged files, shards taken back."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections import Counter

import numpy as np
import pytest

from logitstore.errors import DamagedShardError
from logitstore.format import layout
from logitstore.format.commit import commit_bytes, make_commit
from logitstore.format.spec import maker
from logitstore.inspection.verify import repair, verify
from logitstore.storage.storage import Storage
from logitstore.store.commits import protocol
from logitstore.store.reader import Store
from logitstore.store.take_back import take_back
from tests.helpers.one_shard import SPEC, A, B, C, World, check_finished, make_world, num_steps, whose
from tests.helpers.stepping import SteppedStorage


@pytest.fixture(params=["local", "memory"])
def world(request, tmp_path, monkeypatch):
    with make_world(request.param, tmp_path, monkeypatch) as world:
        yield world


class Recorder(SteppedStorage):
    """A storage that records the requests that change something."""

    def __init__(self, url):
        super().__init__(url)
        self.requests = []

    def _primitive(self, name, *args, **kwargs):
        if name not in ("names", "names_with", "get_many"):
            self.requests.append((name, *args))
        return super()._primitive(name, *args, **kwargs)

    def again(self, name, *args):
        """Carries out a request once more, as if it had been delayed and its sender had given up."""
        with contextlib.suppress(FileNotFoundError):
            getattr(self, name)(*args)


@pytest.mark.parametrize("world", ["memory"], indirect=True)
def test_delayed_request_does_no_harm(world, monkeypatch):
    recorder = Recorder(world.url)
    world.writer(B, storage=recorder).run()
    assert {request[0] for request in recorder.requests} == {"put", "create", "copy", "remove"}
    for number in range(len(recorder.requests)):
        for taken_back in (False, True):
            world.restore()
            recorder.requests.clear()
            world.writer(B, storage=recorder).run()
            if taken_back:
                take_back(Storage(world.url), "tokens", 0)
            recorder.again(*recorder.requests[number])
            assert whose(world) in ((B, None) if taken_back else (B,))
            committed = world.writer(C).run()
            assert committed == check_finished(world)


def stop_after_election(world, attempt):
    """Returns a writer that has become the winner and has published nothing yet."""
    process = world.writer(attempt)
    winner = f"{protocol.staging(attempt[0].layer, attempt[0].shard)}/winner-0.json"
    while winner not in world.content():
        process.advance()
    return process


def remove_objects(content):
    return {path: data for path, data in content.items() if not re.search("staging/.*[.]ids$", path)}


def change_winner(change):
    def changed(content):
        return {path: change(data) if "winner-0.json" in path else data for path, data in content.items()}

    return changed


def change_field(name, value):
    return change_winner(lambda data: json.dumps(json.loads(data) | {name: value}).encode())


DAMAGE = {
    "objects gone": remove_objects,
    "empty": change_winner(lambda _: b""),
    "half": change_winner(lambda data: data[: len(data) // 2]),
    "a list": change_winner(lambda _: b"[]"),
    "no attempt": change_field("attempt", 10**31),
    "an attempt elsewhere": change_field("attempt", "../../tokens/ids/c/0"),
    "no objects": change_field("objects", 7),
    "objects of no layer": change_field("objects", [["ids"]]),
    "another record": change_field("commit", commit_bytes(C[0]).decode()),
    "no record": change_field("commit", None),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_staged_files_do_not_block_the_next_writer(world, damage):
    stop_after_election(world, A).kill()
    damaged = DAMAGE[damage](world.content())
    assert damaged != world.content()
    world.restore(damaged)
    assert world.writer(B).run() == check_finished(world) == B[0]


@pytest.mark.parametrize("damage", ["objects gone", "half"])
@pytest.mark.parametrize("world", ["memory"], indirect=True)
def test_two_writers_that_replace_a_damaged_winner_agree(world, damage):
    stop_after_election(world, A).kill()
    damaged = DAMAGE[damage](world.content())
    most = num_steps(world, protocol.publish, *B) + 5
    for n, m in itertools.product(range(1, most), repeat=2):
        world.restore(damaged)
        b, c = world.writer(B), world.writer(C)
        b.advance(n)
        c.advance(m)
        assert whose(world) in (None, B, C)
        assert b.run() == c.run() == check_finished(world)


def test_taking_a_shard_back_deletes_staged_files_of_the_layers_above(world):
    """Otherwise the next writer would publish values that are already stale."""
    (tokens, _), storage = A, Storage(world.url)
    world.writer(A).run()
    for layer in ("target", "losses/x"):
        values = {array.name: np.zeros(0, array.dtype) for array in layout.layer_arrays(layer)}
        sizes = {"documents": 0, "rows": 0, "counted": 0, "seconds": 0.0, "made_by": maker(SPEC)}
        commit = make_commit(layer, 0, values, computed_from=tokens.digest, **sizes)
        stop_after_election(world, (commit, dict.fromkeys(values, b"x"))).kill()
    assert len(storage.names(protocol.staging("target", 0))) == 1 + len(layout.TARGET)
    assert len(storage.names(protocol.staging("losses/x", 0))) == 1 + len(layout.LOSSES)
    take_back(storage, "target", 0)
    assert storage.names(protocol.staging("losses/x", 0)) == []
    stop_after_election(world, (commit, dict.fromkeys(values, b"x"))).kill()
    take_back(storage, "tokens", 0)
    assert all("staging" not in path for path in world.content())


def test_damage_by_a_writer_from_before_a_repair_is_detected(world):
    """The protocol cannot prevent such damage. Readers refuse the shard, and another repair and dump restore it."""
    outcomes = Counter()
    for n in range(1, num_steps(world, protocol.publish, *B) + 1):
        world.restore()
        zombie = world.writer(B)
        zombie.advance(n)
        world.writer(A).run()
        take_back(Storage(world.url), "tokens", 0)
        world.writer(C).run()
        check_finished(world, stopped=True)
        while True:
            try:
                seen = whose(world)
            except DamagedShardError:
                seen = None
            assert seen in (None, C)
            try:
                if not zombie.advance():
                    break
            except DamagedShardError:
                break
        store = Store(Storage(world.url))
        problems = verify(store, num_threads=1)
        outcomes[bool(problems)] += 1
        assert {(problem.layer, problem.shard) for problem in problems} <= {("tokens", 0)}
        repair(store, problems)
        assert world.writer(A).run() == check_finished(world)
    assert outcomes[False] > outcomes[True] > 0


def test_taking_a_shard_back_can_be_killed_at_any_step(world):
    world.writer(A).run()
    for steps in itertools.count(1):
        world.restore()
        world.writer(A).run()
        taking = world.process(take_back, "tokens", 0)
        alive = taking.advance(steps)
        taking.kill()
        assert whose(world) in (A, None)
        committed = world.writer(B).run()
        assert committed in (A[0], B[0])
        assert committed == check_finished(world, stopped=True)
        if not alive:
            break
    assert committed == B[0]


def test_cleaning_does_not_follow_links_out_of_the_store(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("mine")
    World(str(tmp_path / "s"))
    staged = tmp_path / "s/staging/tokens"
    (staged / "000000").mkdir(parents=True)
    (staged / "000000/link").symlink_to(outside)
    (staged / "000001").symlink_to(outside)
    for shard in (0, 1):
        protocol.clean(Storage(tmp_path / "s"), "tokens", shard)
    assert list(staged.iterdir()) == []
    assert (outside / "file").read_text() == "mine"
