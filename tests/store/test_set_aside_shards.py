"""Shards that fail repeatedly: how they are scheduled, and how they are recorded."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest

import logitstore
from logitstore.dump.schedule import MAX_ATTEMPTS, MAX_IN_A_ROW, Schedule
from logitstore.errors import DamagedShardError, StorageRefusedError
from logitstore.storage.storage import Storage
from logitstore.store.commits import set_aside


def handed_out(schedule):
    return list(schedule.hand_out())


def scheduled(shards, num_slots, failed_before=()):
    """Returns a schedule whose actors have all started."""
    schedule = Schedule(shards, num_slots, failed_before)
    for slot in range(num_slots):
        schedule.open(slot)
    return schedule


def test_every_actor_gets_one_shard_before_any_gets_two():
    schedule = scheduled(range(5), 2)
    assert handed_out(schedule) == [(0, 0), (1, 1), (0, 2), (1, 3)]
    assert handed_out(schedule) == []
    schedule.finish(1, 1)
    assert handed_out(schedule) == [(1, 4)]
    for slot, shard in ((0, 0), (0, 2), (1, 3), (1, 4)):
        assert not schedule.is_done
        schedule.finish(slot, shard)
    assert schedule.is_done


def test_failed_shard_is_retried_last_on_another_actor_and_alone():
    schedule = scheduled(range(6), 2)
    handed_out(schedule)  # 0 and 2 at slot 0, 1 and 3 at slot 1
    assert not schedule.fail(0, 0, again=True)
    assert not schedule.fail(0, 2, again=True)
    assert handed_out(schedule) == [(0, 4), (0, 5)]
    schedule.finish(1, 1)
    assert handed_out(schedule) == []  # 3 is still running
    schedule.finish(1, 3)
    assert handed_out(schedule) == [(1, 0)]
    schedule.finish(0, 4)
    schedule.finish(0, 5)
    assert handed_out(schedule) == []  # 2 failed at slot 0, and waits for slot 1
    schedule.finish(1, 0)
    assert handed_out(schedule) == [(1, 2)]


def test_shard_is_set_aside_after_max_attempts_or_a_permanent_error():
    schedule = scheduled(range(2), 1)
    handed_out(schedule)
    assert schedule.fail(0, 1, again=False)
    for attempt in range(1, MAX_ATTEMPTS):
        assert not schedule.fail(0, 0, again=True)
        assert schedule.attempts(0) == attempt
        assert handed_out(schedule) == [(0, 0)]
    assert schedule.fail(0, 0, again=True)
    assert schedule.is_done


def test_shards_running_beside_a_fatal_shard_are_not_set_aside():
    """Shard 1 kills the actor that runs it, and with it the other shard of that actor."""
    schedule = scheduled(range(8), 1)
    finished, aside = [], []
    while not schedule.is_done:
        handed_out(schedule)
        running = list(schedule._at[0])
        if 1 in running:
            aside += [shard for shard in running if schedule.fail(0, shard, again=True)]
            assert not schedule.blame(0, 1)
        else:
            schedule.finish(0, running[0])
            finished.append(running[0])
    assert aside == [1]
    assert sorted(finished) == [0, 2, 3, 4, 5, 6, 7]


def test_actor_whose_shards_all_fail_is_given_up():
    schedule = scheduled(range(100), 2)
    handed_out(schedule)
    assert [schedule.blame(0, 0) for _ in range(MAX_ATTEMPTS)] == [False, False, True]
    assert schedule.has_slots
    assert [schedule.blame(1, 1), schedule.blame(1, None), schedule.blame(1, 3)] == [False, False, True]
    assert not schedule.has_slots


def test_actor_that_has_finished_a_shard_may_fail_more_often():
    schedule = scheduled(range(100), 1)
    handed_out(schedule)
    schedule.blame(0, 0)
    schedule.finish(0, 1)
    assert [schedule.blame(0, 0) for _ in range(MAX_IN_A_ROW)] == [False] * (MAX_IN_A_ROW - 1) + [True]


def test_shards_that_failed_in_an_earlier_run_come_last_and_do_not_count_against_the_actor():
    schedule = scheduled(range(4), 1, {0, 1})
    assert handed_out(schedule) == [(0, 2), (0, 3)]
    schedule.blame(0, 0)
    schedule.blame(0, 1)
    assert [schedule.blame(0, 2) for _ in range(MAX_ATTEMPTS)] == [False] * (MAX_ATTEMPTS - 1) + [True]


def test_failed_restart_counts_against_the_actor_after_a_shard_that_failed_before():
    schedule = scheduled(range(2), 1, {1})
    handed_out(schedule)
    schedule.finish(0, 0)
    assert not schedule.fail(0, 1, again=True)
    assert not schedule.blame(0, 1)
    schedule.close(0)
    assert [schedule.blame(0, None) for _ in range(MAX_IN_A_ROW)] == [False] * (MAX_IN_A_ROW - 1) + [True]
    assert not schedule.has_slots
    assert not schedule.is_done


def test_shards_are_given_only_to_started_actors():
    schedule = Schedule(range(5), 3, ())
    assert handed_out(schedule) == []
    schedule.open(1)
    assert handed_out(schedule) == [(1, 0), (1, 1)]
    assert not schedule.fail(1, 0, again=True)
    assert not schedule.blame(1, 0)
    schedule.close(1)
    assert not schedule.fail(1, 1, again=True)
    assert handed_out(schedule) == []
    schedule.open(1)
    assert handed_out(schedule) == [(1, 2), (1, 3)]


def test_one_started_actor_finishes_all_shards():
    """It also retries the shard that it failed with, because no other actor has started."""
    schedule = Schedule(range(4), 3, ())
    schedule.open(0)
    finished = []
    while not schedule.is_done:
        handed_out(schedule)
        shard = schedule._at[0][0]
        if shard == 1 and not schedule.attempts(1):
            assert not schedule.fail(0, shard, again=True)
        else:
            schedule.finish(0, shard)
            finished.append(shard)
    assert finished == [0, 2, 3, 1]


def test_last_shards_wait_for_starting_actors():
    schedule = Schedule(range(3), 3, ())
    schedule.open(0)
    assert handed_out(schedule) == [(0, 0)]
    schedule.open(2)
    assert handed_out(schedule) == [(2, 1)]
    schedule.finish(0, 0)
    assert handed_out(schedule) == [(0, 2)]


def test_all_actors_are_given_up_when_none_can_start():
    schedule = Schedule(range(9), 3, ())
    assert [schedule.blame(slot, None) for slot in (0, 0, 2)] == [False] * 3
    assert schedule.has_slots
    assert schedule.blame(1, None)
    assert not schedule.has_slots


def test_actor_that_cannot_start_does_not_affect_the_others():
    schedule = Schedule(range(9), 2, ())
    schedule.open(1)
    assert [schedule.blame(0, None) for _ in range(MAX_ATTEMPTS)] == [False] * (MAX_ATTEMPTS - 1) + [True]
    assert schedule.has_slots
    assert handed_out(schedule) == [(1, 0), (1, 1)]


@pytest.fixture
def storage(tiny_store, tmp_path):
    shutil.copytree(tiny_store, tmp_path / "c.zarr")
    shutil.rmtree(tmp_path / "c.zarr" / "commits" / "losses")
    return Storage(tmp_path / "c.zarr")


LAYER = "losses/reference"


def test_records_are_read_in_order_and_can_be_replaced_and_cleared(storage):
    assert set_aside.read_set_aside(storage, LAYER) == {}
    for shard in (2, 0):
        set_aside.record(storage, LAYER, shard, "why\nnot " + "x" * 500, 3)
    last = set_aside.record(storage, LAYER, 2, "died", 4)
    found = set_aside.read_set_aside(storage, LAYER)
    assert list(found) == [0, 2]
    assert (found[0].reason, found[0].attempts) == ("why not " + "x" * 292, 3)
    assert found[2] == last
    assert last.when.endswith("+00:00")
    set_aside.clear(storage, LAYER, 2)
    set_aside.clear(storage, LAYER, 1)
    assert list(set_aside.read_set_aside(storage, LAYER)) == [0]


def test_records_of_committed_shards_are_ignored(storage):
    set_aside.record(storage, "target", 1, "died", 3)
    set_aside.record(storage, LAYER, 1, "died", 3)
    assert set_aside.read_set_aside(storage, "target") == {}
    for layer in ("target", LAYER):
        set_aside.clear_committed(storage, layer)
    assert storage.names("set_aside/target") == []
    assert list(set_aside.read_set_aside(storage, LAYER)) == [1]


@pytest.mark.parametrize(
    "content",
    [
        b"", b"[]", b"{", b"{}", b"x" * 10**6, b'{"reason": 1, "attempts": 1, "when": "", "writer": ""}',
        b'{"reason": "r", "attempts": true, "when": "", "writer": ""}', b"[" * 4000,
        b'{"reason": "r", "attempts": 1, "when": "", "writer": "", "more": 1}',
        b'{"reason": "r", "reason": "s", "attempts": 1, "when": "", "writer": ""}', b"\xff\xfe",
    ],
)  # fmt: skip
def test_malformed_record_is_reported_as_unreadable(storage, content):
    set_aside.record(storage, LAYER, 0, "fine", 1)
    folder = Path(storage.root, "set_aside", LAYER)
    (folder / "000001.json").write_bytes(content)
    for name in ("1.json", "00000x.json", "0000001.json", "000002.json.partial", "000003"):
        (folder / name).write_text("no record")
    (folder / "000002.json").mkdir()
    found = set_aside.read_set_aside(storage, LAYER)
    assert list(found) == [0, 1]
    assert found[1] == set_aside.UNREADABLE


def test_long_reason_in_a_record_is_cut(storage):
    value = {"reason": "r" * 2000, "attempts": 1, "when": "", "writer": ""}
    set_aside.record(storage, LAYER, 0, "", 1)
    Path(storage.root, "set_aside", LAYER, "000000.json").write_text(json.dumps(value))
    assert len(set_aside.read_set_aside(storage, LAYER)[0].reason) == set_aside.REASON_LENGTH


def test_record_with_the_longest_reason_can_be_read(storage):
    set_aside.record(storage, LAYER, 0, "\U0001f600" * 400, 10**9)
    assert set_aside.read_set_aside(storage, LAYER)[0].reason == "\U0001f600" * set_aside.REASON_LENGTH


@pytest.mark.parametrize("layer", ["../x", "losses/../../x", "losses/", "target/x"])
def test_names_that_are_not_layers_are_refused(storage, layer):
    with pytest.raises(ValueError, match="must consist of"):
        set_aside.read_set_aside(storage, layer)
    with pytest.raises(ValueError, match="must consist of"):
        set_aside.record(storage, layer, 0, "", 1)


def test_errors_are_pickled_without_loss():
    damaged = DamagedShardError("target", 3, "other bytes")
    same = pickle.loads(pickle.dumps(damaged))
    assert (type(same), str(same)) == (DamagedShardError, str(damaged))
    assert (same.layer, same.shard, same.reason) == ("target", 3, "other bytes")
    for kind in (StorageRefusedError, logitstore.IdentityError, logitstore.errors.StorageError):
        same = pickle.loads(pickle.dumps(kind("one line")))
        assert (type(same), str(same)) == (kind, "one line")
