"""Appends under every interruption: jobs that add the same or other documents, stopped and killed at any step.

The same method as in test_protocol.py: `write_part` runs on a real folder or on `memory://`, and a step is one system
call or one request. All pairs of steps take a long time:

    LOGITSTORE_LONG=1 python -m pytest --timeout=0 -o faulthandler_timeout=0 tests/store/test_protocol_appends.py
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import logitstore
from logitstore.documents.tokens_layer import write_part
from logitstore.errors import IdentityError
from logitstore.format.spec import DataSpec, StoreSpec, TokenizerSpec
from logitstore.inspection.verify import repair, verify
from logitstore.rows.tokens import encode_tokens
from logitstore.storage.storage import Storage
from logitstore.store.commits import appends
from logitstore.store.reader import Store
from logitstore.store.take_back import sweep
from tests.helpers.stepping import Process, SteppedStorage, content, put_back, stepped_storage, stepped_url

LONG = os.environ.get("LOGITSTORE_LONG") == "1"
SHARD_ROWS = 8
SPEC = StoreSpec(
    tokenizer=TokenizerSpec(name="none", fingerprint=f"sha256:{'0' * 64}", vocab_size=100, chat_template=None),
    data=DataSpec(source="none", digest=None, columns="input_ids", mask_policy="given"),
    max_length=SHARD_ROWS, shard_rows=SHARD_ROWS, num_shards=0,
)  # fmt: skip


class Documents:
    """Data with one document of random tokens in each shard."""

    def __init__(self, seed, num_shards):
        rng = np.random.default_rng(seed)
        self.num_shards = num_shards
        self.ids = [rng.integers(0, 100, SHARD_ROWS - i, np.uint32) for i in range(num_shards)]

    def shard(self, number):
        ids = self.ids[number]
        mask = np.arange(len(ids)) < len(ids) - 1
        return encode_tokens(ids, mask, np.array([len(ids)]))


FIRST, SHORT, LONGER, THIRD = (Documents(seed, num) for seed, num in enumerate((1, 1, 2, 1)))
APPENDED = (SHORT, LONGER, THIRD)


def add(storage, documents):
    """Appends documents as a job does. Returns False if another unfinished append refuses it."""
    spec = dataclasses.replace(SPEC, data=dataclasses.replace(SPEC.data, source=name_of(documents)))
    try:
        write_part(storage, spec, documents, append=True)
    except IdentityError as error:
        if "is running or was left unfinished" not in str(error):
            raise
        return False
    return True


def name_of(documents):
    return str((FIRST, *APPENDED).index(documents))


class World:
    """A store with its first documents, which can be reset to that state."""

    def __init__(self, url):
        self.url = url
        self.is_local = Storage(url).is_local
        assert add(Storage(url), FIRST)
        self._begun = self.content()

    def process(self, documents):
        stepped = stepped_storage(self.url)
        return Process(lambda: add(stepped, documents))

    def content(self):
        return content(self.url)

    def restore(self):
        Storage(self.url)._fs.rm(Storage(self.url).root, recursive=True)
        put_back(self.url, self._begun)


@pytest.fixture(params=["local", "memory"])
def world(request, tmp_path, monkeypatch):
    with stepped_url(request.param, tmp_path, monkeypatch) as url:
        yield World(url)


def check(world, *wanted, finished=True):
    """Checks that the store has the first documents, followed by some of the wanted ones, complete and once each.

    Returns:
        The wanted documents that are in the store, in their order.
    """
    store = logitstore.open(world.url)
    names = [append.data.source for append in store.spec.appends]
    assert len(set(names)) == len(names)
    assert set(names) <= {name_of(documents) for documents in wanted}
    held = [FIRST, *(APPENDED[int(name) - 1] for name in names)]
    if finished:
        assert len(held) == 1 + len(set(wanted))
        assert verify(store, num_threads=1) == []
        assert store.storage.names("staging/tokens") == []
        assert len(store.layers["tokens"].index) == store.num_shards
        assert [name for name in store.storage.names(appends.FOLDER) if name.endswith(".claim")] == []
    expected = [documents.ids[number].tolist() for documents in held for number in range(documents.num_shards)]
    assert [document.ids.tolist() for document in store] == expected
    return held[1:]


def num_steps(world, documents):
    """Returns the number of steps of an append that is not interrupted."""
    world.restore()
    process = world.process(documents)
    assert process.run()
    check(world, documents)
    world.restore()
    return len(process.steps)


def finish(world, *wanted):
    """Runs killed or refused commands again until all are done. Each round completes at least one."""
    for _ in wanted:
        done = [add(Storage(world.url), documents) for documents in wanted]
        sweep(Storage(world.url))  # jobs do this at their end
        if all(done):
            break
    check(world, *wanted)


def some(world, moments, local, memory):
    """Returns all steps in long runs, otherwise every `local`th or `memory`th, because each takes 0.05 s."""
    return itertools.islice(moments, 0, None, 1 if LONG else local if world.is_local else memory)


def test_append_killed_at_any_step_is_invisible_or_complete_and_can_be_finished(world):
    for n in some(world, range(1, num_steps(world, LONGER) + 1), local=17, memory=4):
        world.restore()
        process = world.process(LONGER)
        process.advance(n)
        process.kill()
        there = check(world, LONGER, finished=False)
        assert verify(Store(Storage(world.url)), num_threads=1) == []
        # Another append is accepted once this one is complete, or if it has not claimed its number yet.
        let_in = add(Storage(world.url), SHORT)
        assert let_in or not there
        assert add(Storage(world.url), LONGER)
        finish(world, LONGER, SHORT)


@pytest.mark.parametrize("second", [LONGER, SHORT], ids=["the same documents", "others"])
def test_two_appends_stopped_at_any_step_are_both_completed(world, second):
    outcomes = Counter()
    every = itertools.product(*(range(1, num_steps(world, documents) + 1) for documents in (LONGER, second)))
    for n, m in some(world, every, local=4001, memory=401):
        for first_ends_first in (True, False):
            world.restore()
            processes = [world.process(LONGER), world.process(second)]
            processes[0].advance(n)
            processes[1].advance(m)
            check(world, LONGER, second, finished=False)
            order = processes if first_ends_first else processes[::-1]
            done = []
            for process in order:
                done.append(process.run())
                check(world, LONGER, second, finished=False)
                assert verify(Store(Storage(world.url)), num_threads=1) == []
            assert any(done)
            assert all(done) or second is not LONGER
            if all(done):
                check(world, LONGER, second)
            outcomes[tuple(done)] += 1
            finish(world, LONGER, second)
    assert outcomes[True, True] > 0


@pytest.mark.parametrize("other", [LONGER, SHORT], ids=["the same documents", "others"])
def test_append_that_continues_after_another_has_finished_comes_after_it(world, other):
    """A job can claim a number that is already used. It then starts again with the next, and has written nothing."""
    outcomes = Counter()
    for n in some(world, range(1, num_steps(world, LONGER) + 1), local=13 if other is LONGER else 2, memory=1):
        world.restore()
        late = world.process(LONGER)
        late.advance(n)
        let_in = add(Storage(world.url), other)
        assert late.run()
        outcomes[let_in] += 1
        if not let_in:  # from this step on, the late append has the claim
            assert check(world, LONGER) == [LONGER]
            break
        assert check(world, other, LONGER)[0] is other
    assert outcomes[True] > 3
    assert (outcomes[False] == 0) == (other is LONGER)


@settings(
    max_examples=1000 if LONG else 8, derandomize=not LONG, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40), st.booleans()), max_size=14))
def test_four_appends_that_take_turns_and_are_killed_are_all_completed(world, turns):
    world.restore()
    wanted = [SHORT, LONGER, LONGER, THIRD]
    processes = [world.process(documents) for documents in wanted]
    for number, steps, dies in turns:
        processes[number].advance(steps)
        if dies:
            processes[number].kill()
        check(world, *wanted, finished=False)
    for process in processes:
        process.run()
        check(world, *wanted, finished=False)
        assert verify(Store(Storage(world.url)), num_threads=1) == []
    finish(world, *wanted)


def test_giving_up_an_append_can_be_killed_at_any_step_and_repeated(world):
    for n in some(world, range(5, num_steps(world, LONGER)), local=97, memory=17):
        for steps in some(world, itertools.count(1), local=23, memory=7):
            world.restore()
            process = world.process(LONGER)
            process.advance(n)
            process.kill()
            if check(world, LONGER, finished=False):
                break
            giving_up = Process(lambda: repair(Store(SteppedStorage(world.url)), []))
            alive = giving_up.advance(steps)
            giving_up.kill()
            check(world, LONGER, finished=False)
            repair(Store(Storage(world.url)), [])
            check(world)
            assert add(Storage(world.url), SHORT)
            finish(world, SHORT, LONGER)
            if not alive:
                break


def test_job_that_continues_after_its_append_was_given_up_is_detected_and_repaired(world):
    """The protocol cannot prevent this, as with shards that were taken back, so verify must detect it."""
    outcomes = Counter()
    for n in some(world, range(1, num_steps(world, LONGER) + 1), local=23, memory=4):
        world.restore()
        zombie = world.process(LONGER)
        zombie.advance(n)
        repair(Store(Storage(world.url)), [])
        assert add(Storage(world.url), SHORT)
        check(world, SHORT, LONGER, finished=False)
        with contextlib.suppress(IdentityError):
            zombie.run()
        store = Store(Storage(world.url))
        problems = verify(store, num_threads=1)
        outcomes[bool(problems)] += 1
        repair(store, problems)
        try:
            finish(world, SHORT, LONGER)
        except IdentityError:
            outcomes["again"] += 1
            repair(Store(Storage(world.url)), [])
            finish(world, SHORT, LONGER)
    assert outcomes[False] > outcomes[True]
