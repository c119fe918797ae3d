"""The commit protocol under every interruption: writers of one shard, with different values, stopped at any step.

`docs/format.md` argues that no interleaving does harm; these tests run the interleavings. On a local disk a step is one
system call, elsewhere one request. All pairs of steps take ten minutes:

    LOGITSTORE_LONG=1 python -m pytest --timeout=0 -o faulthandler_timeout=0 tests/store/test_protocol.py
"""

from __future__ import annotations

import errno
import itertools
import os
import uuid

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from logitstore.errors import LayerNotFoundError
from logitstore.format.commit import layer_digest
from logitstore.storage import local_disk
from logitstore.storage.storage import Storage
from logitstore.store.commits import protocol
from logitstore.store.commits.index import find_commit
from logitstore.store.reader import Store
from logitstore.store.take_back import sweep
from tests.helpers.one_shard import EVERYBODY, A, B, C, check_finished, make_world, num_steps, whose
from tests.helpers.stepping import SteppedStorage, current

LONG = os.environ.get("LOGITSTORE_LONG") == "1"


@pytest.fixture(params=["local", "memory"])
def world(request, tmp_path, monkeypatch):
    with make_world(request.param, tmp_path, monkeypatch) as world:
        yield world


def pairs(world, first, second):
    """Returns all pairs of steps; on a local disk, where there are thousands, only every 31st."""
    every = itertools.product(range(1, first + 1), range(1, second + 1))
    return every if LONG or not world.is_local else itertools.islice(every, 0, None, 31)


@pytest.mark.parametrize(("world", "links"), [("local", True), ("local", False), ("memory", True)], indirect=["world"])
def test_writer_killed_at_any_step_leaves_a_valid_store(world, monkeypatch, links):
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
def test_only_files_with_temporary_names_are_written(world, monkeypatch, links):
    """This is why writers need not be stopped while they write a file: it becomes visible only when it is renamed."""
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    process = world.writer(A)
    process.run()
    written = [step for step in process.steps if step.startswith("open for writing")]
    assert len(written) >= len(A[1]) + 2
    assert all(step.endswith(".partial") for step in written)


@pytest.mark.parametrize("world", ["local"], indirect=True)
def test_staging_folder_can_be_cleaned_while_another_writer_uses_it(world):
    """This is the only folder that two writers change at the same time."""
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


def test_writer_that_continues_after_another_has_finished_changes_nothing(world):
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
def test_two_writers_stopped_at_any_step_agree_with_a_third(world):
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


def test_reader_stopped_at_any_step_sees_no_shard_or_a_whole_one(world):
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
def test_every_interleaving_of_two_writers_commits_one_whole_shard(world, monkeypatch):
    """All interleavings are covered: those with equal files and equal answers so far continue in the same way."""
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
                # Another writer finishes, as if both were killed now.
                assert protocol.publish(Storage(world.url), *C) == check_finished(world)
                world.restore(content)
            pending += [(*schedule, number) for number in going[1:]]
            schedule = (*schedule, going[0])
            processes[going[0]].advance()
        for process in processes:
            process.kill()
    assert len(seen) > 1000


@settings(
    max_examples=1000 if LONG else 60,
    derandomize=not LONG,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 25), st.booleans()), max_size=12))
def test_three_writers_that_take_turns_and_are_killed_agree(world, turns):
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
    """A bucket that loses the answer to each create: the request is repeated, and finds the object that it created."""

    def create(self, path, data):
        super().create(path, data)
        return False


@pytest.mark.parametrize("world", ["memory"], indirect=True)
def test_writer_wins_even_if_the_answer_to_its_create_is_lost(world):
    for n in range(num_steps(world, protocol.publish, *A) + 1):
        world.restore()
        first, second = (world.writer(attempt, storage=Echo(world.url)) for attempt in (A, B))
        first.advance(n)
        committed = second.run()
        assert first.run() == committed == check_finished(world)
