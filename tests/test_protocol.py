"""The commit protocol under every interruption: writers of one shard, with different values, stopped anywhere.

`docs/format.md` argues that no interleaving harms; these tests run the interleavings. On a local disk writers are
stopped before each single system call, elsewhere before each request. All pairs of moments take ten minutes:

    LOGITSTORE_LONG=1 python -m pytest --timeout=0 -o faulthandler_timeout=0 tests/test_protocol.py
"""

from __future__ import annotations

import errno
import itertools
import os
import uuid

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from one_shard import EVERYBODY, A, B, C, check_finished, make_world, num_steps, whose
from stepping import SteppedStorage, current

from logitstore.errors import LayerNotFoundError
from logitstore.format.commit import layer_digest
from logitstore.storage import local_disk
from logitstore.storage.storage import Storage
from logitstore.store.commits import protocol
from logitstore.store.commits.index import find_commit
from logitstore.store.reader import Store
from logitstore.store.take_back import sweep

LONG = os.environ.get("LOGITSTORE_LONG") == "1"


@pytest.fixture(params=["local", "memory"])
def world(request, tmp_path, monkeypatch):
    with make_world(request.param, tmp_path, monkeypatch) as world:
        yield world


def pairs(world, first, second):
    """All pairs of moments, or, where there are thousands, as many of them as there is time for."""
    every = itertools.product(range(1, first + 1), range(1, second + 1))
    return every if LONG or not world.is_local else itertools.islice(every, 0, None, 31)


@pytest.mark.parametrize(("world", "links"), [("local", True), ("local", False), ("memory", True)], indirect=["world"])
def test_a_writer_that_is_killed_anywhere_leaves_nothing_wrong(world, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr(local_disk, "ABANDONED_S", 0)
    steps = num_steps(world, protocol.publish, *A)
    assert steps > 12
    for n in range(1, steps + 1):
        world.restore()
        first = world.writer(A)
        first.advance(n)
        first.kill()
        assert whose(world) in (None, A)
        assert world.writer(B).run() == check_finished(world, stopped=True)
        sweep(Storage(world.url))
        check_finished(world)


def no_links(*_):
    raise OSError(errno.EPERM, "no links here")


@pytest.mark.parametrize("world", ["local"], indirect=True)
@pytest.mark.parametrize("links", [True, False])
def test_only_files_without_a_final_name_are_written(world, monkeypatch, links):
    """Writers are not stopped in the middle of a file: it need not be whole before it is renamed or linked."""
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    process = world.writer(A)
    process.run()
    written = [step for step in process.steps if step.startswith("open for writing")]
    assert len(written) >= len(A[1]) + 2
    assert all(step.endswith(".partial") for step in written)


@pytest.mark.parametrize("world", ["local"], indirect=True)
def test_a_folder_that_is_cleaned_while_another_writes_to_it(world):
    """The one place where two changes to one folder meet."""
    staging, whole = (num_steps(world, function, *A) for function in (stage_only, protocol.publish))
    for n, m in itertools.product(range(whole - 8, whole + 1), range(2, staging + 1, 1 if LONG else 2)):
        world.restore()
        first, second = world.writer(A), world.writer(B)
        second.advance(m)
        first.advance(n)
        second.advance(2)
        assert first.run() == second.run() == check_finished(world)


def stage_only(storage, commit, encoded):
    find_commit(storage, "tokens", 0)
    protocol._stage(storage, protocol.Winner(attempt="0" * 32, objects=tuple(encoded), commit=commit), encoded)


def test_a_writer_that_goes_on_after_another_has_finished_changes_nothing(world):
    for n in range(1, num_steps(world, protocol.publish, *A) + 1):
        world.restore()
        first, second = world.writer(A), world.writer(B)
        first.advance(n)
        committed = second.run()
        assert committed == check_finished(world, stopped=True)
        while first.advance():
            assert whose(world)[0] == committed
        assert first.value == check_finished(world) == committed


@pytest.mark.parametrize("world", ["local"], indirect=True)
def test_two_writers_stopped_anywhere_and_a_third(world):
    first, second = (num_steps(world, protocol.publish, *attempt) for attempt in (A, B))
    for n, m in pairs(world, first, second):
        for third_is_last in (False, True):
            world.restore()
            a, b, c = (world.writer(attempt) for attempt in EVERYBODY)
            a.advance(n)
            b.advance(m)
            assert whose(world) in (None, A, B)
            order = (a, c, b) if third_is_last else (c, b, a)
            committed = order[0].run()
            assert committed == check_finished(world, stopped=True)
            for process in order[1:]:
                assert process.run() == committed
                assert committed == check_finished(world, stopped=True)
            check_finished(world)


def test_a_reader_that_is_stopped_anywhere_sees_nothing_or_a_whole_shard(world):
    def read(storage):
        try:
            return layer_digest("tokens", Store(storage).reader.read_arrays("tokens", 0))
        except LayerNotFoundError:
            return None

    world.writer(A).run()
    reading = world.process(read)
    assert reading.run() == A[0].digest
    for n, m in pairs(world, num_steps(world, protocol.publish, *A), len(reading.steps)):
        world.restore()
        first, second, reader = world.writer(A), world.writer(B), world.process(read)
        first.advance(n)
        reader.advance(m)
        committed = second.run()
        reader.advance(1)
        first.run()
        assert reader.run() in (None, committed.digest)


@pytest.mark.parametrize("world", ["memory"], indirect=True)
@pytest.mark.long
def test_every_interleaving_of_two_writers(world, monkeypatch):
    """All of them: two that come to the same store, with the same answers behind each writer, go on the same."""
    count = itertools.count()
    monkeypatch.setattr(uuid, "uuid4", lambda: uuid.UUID(int=current().draw() if current() else next(count)))
    seen, stores = set(), set()
    pending = [()]
    while pending:
        schedule = pending.pop()
        world.restore()
        processes = [world.writer(A), world.writer(B)]
        for number, process in enumerate(processes):
            process.draw = itertools.count(1000 * (number + 1)).__next__
            process.advance()
        for number in schedule:
            processes[number].advance()
        while True:
            content = world.content()
            state = frozenset(content.items()), *(tuple(process.history) for process in processes)
            if state in seen:
                break
            seen.add(state)
            going = [number for number, process in enumerate(processes) if not process.finished]
            if not going:
                assert [process.value for process in processes] == [check_finished(world)] * 2
                break
            if state[0] not in stores:
                stores.add(state[0])
                assert whose(world) in (None, A, B)
                # As if both were killed now.
                assert protocol.publish(Storage(world.url), *C) == check_finished(world)
                world.restore(content)
            pending += [(*schedule, number) for number in going[1:]]
            schedule = (*schedule, going[0])
            processes[going[0]].advance()
        for process in processes:
            process.kill()
    assert len(seen) > 1000


@settings(
    max_examples=1000 if LONG else 60, derandomize=not LONG, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 25), st.booleans()), max_size=12))
def test_three_writers_that_take_turns_and_die(world, turns):
    world.restore()
    writers = [world.writer(attempt) for attempt in EVERYBODY]
    for number, steps, dies in turns:
        writers[number].advance(steps)
        if dies:
            writers[number].kill()
        assert whose(world) in (None, *EVERYBODY)
    last = world.writer(C)
    committed = last.run()
    assert committed == check_finished(world, stopped=True)
    for process in writers:
        killed = process.finished and process.value is None
        assert killed or process.run() == committed
    assert committed == check_finished(world, stopped=True)


class Echo(SteppedStorage):
    """A bucket whose answer to a request that creates something gets lost: it is sent again, and finds itself."""

    def create(self, path, data):
        super().create(path, data)
        return False


@pytest.mark.parametrize("world", ["memory"], indirect=True)
def test_a_winner_that_is_not_told_so_wins(world):
    for n in range(num_steps(world, protocol.publish, *A) + 1):
        world.restore()
        first, second = (world.writer(attempt, storage=Echo(world.url)) for attempt in (A, B))
        first.advance(n)
        committed = second.run()
        assert first.run() == committed == check_finished(world)
