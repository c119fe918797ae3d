"""Shards that fail again and again: how they are scheduled, and how they are recorded."""

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


def scheduled(shards, num_places, failed_before=()):
    """A schedule whose actors have all started."""
    schedule = Schedule(shards, num_places, failed_before)
    for place in range(num_places):
        schedule.open(place)
    return schedule


def test_each_place_gets_a_shard_before_any_gets_two():
    schedule = scheduled(range(5), 2)
    assert handed_out(schedule) == [(0, 0), (1, 1), (0, 2), (1, 3)]
    assert handed_out(schedule) == []
    schedule.finish(1, 1)
    assert handed_out(schedule) == [(1, 4)]
    for place, shard in ((0, 0), (0, 2), (1, 3), (1, 4)):
        assert not schedule.is_done
        schedule.finish(place, shard)
    assert schedule.is_done


def test_a_shard_that_failed_is_tried_last_elsewhere_and_alone():
    schedule = scheduled(range(6), 2)
    handed_out(schedule)  # 0 and 2 at place 0, 1 and 3 at place 1
    assert not schedule.fail(0, 0, again=True)
    assert not schedule.fail(0, 2, again=True)
    assert handed_out(schedule) == [(0, 4), (0, 5)]
    schedule.finish(1, 1)
    assert handed_out(schedule) == []  # 3 is still there
    schedule.finish(1, 3)
    assert handed_out(schedule) == [(1, 0)]
    schedule.finish(0, 4)
    schedule.finish(0, 5)
    assert handed_out(schedule) == []  # 2 failed here, and waits for the other place
    schedule.finish(1, 0)
    assert handed_out(schedule) == [(1, 2)]


def test_a_shard_is_set_aside_when_it_was_tried_often_enough_or_there_is_no_use():
    schedule = scheduled(range(2), 1)
    handed_out(schedule)
    assert schedule.fail(0, 1, again=False)
    for attempt in range(1, MAX_ATTEMPTS):
        assert not schedule.fail(0, 0, again=True)
        assert schedule.attempts(0) == attempt
        assert handed_out(schedule) == [(0, 0)]
    assert schedule.fail(0, 0, again=True)
    assert schedule.is_done


def test_what_dies_beside_the_shard_to_blame_is_not_set_aside():
    """Shard 1 kills whoever runs it, and all that runs beside it."""
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


def test_a_place_where_all_fails_is_given_up():
    schedule = scheduled(range(100), 2)
    handed_out(schedule)
    assert [schedule.blame(0, 0) for _ in range(MAX_ATTEMPTS)] == [False, False, True]
    assert schedule.has_places
    assert [schedule.blame(1, 1), schedule.blame(1, None), schedule.blame(1, 3)] == [False, False, True]
    assert not schedule.has_places


def test_once_shards_were_finished_a_place_may_fail_longer():
    schedule = scheduled(range(100), 1)
    handed_out(schedule)
    schedule.blame(0, 0)
    schedule.finish(0, 1)
    assert [schedule.blame(0, 0) for _ in range(MAX_IN_A_ROW)] == [False] * (MAX_IN_A_ROW - 1) + [True]


def test_shards_that_failed_in_an_earlier_run_come_last_and_blame_nobody():
    schedule = scheduled(range(4), 1, {0, 1})
    assert handed_out(schedule) == [(0, 2), (0, 3)]
    schedule.blame(0, 0)
    schedule.blame(0, 1)
    assert [schedule.blame(0, 2) for _ in range(MAX_ATTEMPTS)] == [False] * (MAX_ATTEMPTS - 1) + [True]


def test_a_shard_that_fails_again_blames_nobody_but_an_actor_that_cannot_be_started_after_it_does():
    schedule = scheduled(range(2), 1, {1})
    handed_out(schedule)
    schedule.finish(0, 0)
    assert not schedule.fail(0, 1, again=True)
    assert not schedule.blame(0, 1)
    schedule.close(0)
    assert [schedule.blame(0, None) for _ in range(MAX_IN_A_ROW)] == [False] * (MAX_IN_A_ROW - 1) + [True]
    assert not schedule.has_places
    assert not schedule.is_done


def test_shards_are_handed_only_to_actors_that_have_started():
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


def test_one_actor_finishes_all_while_the_others_never_start():
    """What it failed with too: nobody is awaited who could try that elsewhere."""
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


def test_the_last_shards_wait_for_actors_that_are_starting_rather_than_be_a_second():
    schedule = Schedule(range(3), 3, ())
    schedule.open(0)
    assert handed_out(schedule) == [(0, 0)]
    schedule.open(2)
    assert handed_out(schedule) == [(2, 1)]
    schedule.finish(0, 0)
    assert handed_out(schedule) == [(0, 2)]


def test_actors_that_start_nowhere_end_all_at_once():
    schedule = Schedule(range(9), 3, ())
    assert [schedule.blame(place, None) for place in (0, 0, 2)] == [False] * 3
    assert schedule.has_places
    assert schedule.blame(1, None)
    assert not schedule.has_places


def test_an_actor_that_cannot_be_started_costs_only_its_place():
    schedule = Schedule(range(9), 2, ())
    schedule.open(1)
    assert [schedule.blame(0, None) for _ in range(MAX_ATTEMPTS)] == [False] * (MAX_ATTEMPTS - 1) + [True]
    assert schedule.has_places
    assert handed_out(schedule) == [(1, 0), (1, 1)]


@pytest.fixture
def storage(tiny_store, tmp_path):
    shutil.copytree(tiny_store, tmp_path / "c.zarr")
    shutil.rmtree(tmp_path / "c.zarr" / "commits" / "losses")
    return Storage(tmp_path / "c.zarr")


LAYER = "losses/reference"


def test_records_are_read_back_in_order_replaced_and_cleared(storage):
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


def test_records_of_shards_that_are_committed_mean_nothing(storage):
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
def test_a_malformed_record_is_one_that_cannot_be_read(storage, content):
    set_aside.record(storage, LAYER, 0, "fine", 1)
    folder = Path(storage.root, "set_aside", LAYER)
    (folder / "000001.json").write_bytes(content)
    for name in ("1.json", "00000x.json", "0000001.json", "000002.json.partial", "000003"):
        (folder / name).write_text("no record")
    (folder / "000002.json").mkdir()
    found = set_aside.read_set_aside(storage, LAYER)
    assert list(found) == [0, 1]
    assert found[1] == set_aside.UNREADABLE


def test_a_reason_that_somebody_made_long_is_cut(storage):
    value = {"reason": "r" * 2000, "attempts": 1, "when": "", "writer": ""}
    set_aside.record(storage, LAYER, 0, "", 1)
    Path(storage.root, "set_aside", LAYER, "000000.json").write_text(json.dumps(value))
    assert len(set_aside.read_set_aside(storage, LAYER)[0].reason) == set_aside.REASON_LENGTH


def test_the_longest_reason_fits_into_what_is_read(storage):
    set_aside.record(storage, LAYER, 0, "\U0001f600" * 400, 10**9)
    assert set_aside.read_set_aside(storage, LAYER)[0].reason == "\U0001f600" * set_aside.REASON_LENGTH


@pytest.mark.parametrize("layer", ["../x", "losses/../../x", "losses/", "target/x"])
def test_no_other_name_becomes_a_path(storage, layer):
    with pytest.raises(ValueError, match="must be"):
        set_aside.read_set_aside(storage, layer)
    with pytest.raises(ValueError, match="must be"):
        set_aside.record(storage, layer, 0, "", 1)


def test_errors_survive_the_way_from_an_actor():
    damaged = DamagedShardError("target", 3, "other bytes")
    same = pickle.loads(pickle.dumps(damaged))
    assert (type(same), str(same)) == (DamagedShardError, str(damaged))
    assert (same.layer, same.shard, same.reason) == ("target", 3, "other bytes")
    for kind in (StorageRefusedError, logitstore.IdentityError, logitstore.errors.StorageError):
        same = pickle.loads(pickle.dumps(kind("one line")))
        assert (type(same), str(same)) == (kind, "one line")
