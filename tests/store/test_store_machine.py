"""Random sequences of events in a store, compared with a model of the store in memory.

Hypothesis chooses the events: writers that finish, are killed, or stop and continue much later; appends, damage, lost
records, verify, repair, and readers that stay open. After each event, a reader must see the contents of the model.

By default every run tests the same sequences. To test new ones, for as long as you like:

    LOGITSTORE_EXAMPLES=5000 python -m pytest -s --timeout=0 -o faulthandler_timeout=0 tests/store/test_store_machine.py
"""

from __future__ import annotations

import contextlib
import os

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from logitstore.errors import DamagedShardError, IdentityError, LayerNotFoundError
from logitstore.format import layout
from logitstore.format.spec import Append
from logitstore.inspection.verify import repair, verify
from logitstore.storage.storage import Storage
from logitstore.store import writer
from logitstore.store.commits import appends
from logitstore.store.commits.index import commits_folder
from logitstore.store.reader import Store
from logitstore.store.take_back import take_back
from tests.helpers.known_store import KnownStore, told
from tests.helpers.store_model import LAYERS, StoreModel, add_documents, computed_attempt, data_spec, equal, spec_of

EXAMPLES = os.environ.get("LOGITSTORE_EXAMPLES")
MOST_SHARDS = 5
moments = st.one_of(st.integers(1, 25), st.integers(26, 140))
"""Number of steps that a process may take. A writer takes about 20 in a bucket, and 60 to 120 on a disk."""
some = st.integers(0, 2**16)
"""A number whose remainder chooses one of several items."""


class StoreMachine(KnownStore, RuleBasedStateMachine):
    """The possible events, and the invariant after each of them."""

    @initialize(kind=st.sampled_from(["local", "memory"]), num_shards=st.integers(1, 3), seed=some, full=st.booleans())
    def create(self, kind, num_shards, seed, full):
        self.begin(kind, StoreModel(seed, num_shards))
        writer.create_store(Storage(self.url), spec_of(num_shards))
        self.grow()
        self.tell(f"a store on {kind}")
        if full:
            self.dump(0, wake=False)

    # Events

    def grow(self):
        """Adds the layers, or extends them after an append, as each dump does at its beginning."""
        for layer in LAYERS[1:]:
            spec = spec_of(self.model.num_shards)
            own = spec.target if layer == "target" else spec.losses[layer.removeprefix("losses/")]
            writer.add_layer(Storage(self.url), spec, layer, own)

    def choose(self, number, choices):
        choices = sorted(choices)
        return choices[number % len(choices)]

    def compute(self, key, other, aside):
        """Returns the values that the dump computes for a shard of a layer; None if it cannot read the layer below."""
        if key[0] == "tokens":
            attempt = self.model.documents(key[1])
        else:
            below = layout.below(key[0]), key[1]
            if self.model.errors(below):
                return None
            set_aside = {0: "no numbers"} if aside and below[0] == "tokens" else {}
            seed = [self.model.seed, other, *key[1:]]
            attempt = computed_attempt(key[0], self.model.committed[below], seed, set_aside)
        self.expect(key, attempt)
        return attempt

    def expect(self, key, attempt):
        self.staged.setdefault(key, {})[attempt.name] = attempt
        self.attempts[(*key, attempt.name)] = attempt

    def make_way(self, key):
        if key in self.model.committed and self.model.is_stale(key) and self.model.damaged.get(key) != "record":
            take_back(Storage(self.url), *key)
            self.forget(key)
            self.tell("stale shard replaced")

    @rule(other=st.integers(0, 3), wake=st.booleans())
    def dump(self, other, wake):
        """Writes all missing and stale shards. With `wake`, the writers that had stopped then continue to their end."""
        for key in [(layer, shard) for layer in LAYERS for shard in range(self.model.num_shards)]:
            if key in self.model.committed and not self.model.is_stale(key):
                continue
            self.make_way(key)
            if (attempt := self.compute(key, other, aside=False)) is not None:
                self.finish(self.stepped(attempt.write, spec_of(self.model.num_shards)), key, self.epochs[key])
        self.tell("dump")
        while wake and self.zombies:
            self.go_on(0, 0, goes=True)

    @rule(layer=st.sampled_from(LAYERS), which=some, other=st.integers(0, 3), aside=st.booleans(), steps=moments,
          fate=st.sampled_from(["finishes", "is killed", "stops"]))  # fmt: skip
    def write(self, layer, which, other, aside, steps, fate):
        shards = range(self.model.num_shards)
        missing = [shard for shard in shards if (layer, shard) not in self.model.committed]
        key = layer, self.choose(which, missing if missing and which % 4 else shards)
        if (attempt := self.compute(key, other, aside)) is None:
            return
        self.make_way(key)
        self.expect(key, attempt)  # again, because make_way may have deleted the staged attempts
        process = self.stepped(attempt.write, spec_of(self.model.num_shards))
        self.tell(f"writer {fate}")
        if fate == "finishes":
            self.finish(process, key, self.epochs[key])
            return
        with contextlib.suppress(DamagedShardError):
            process.advance(steps)
        if fate == "is killed":
            process.kill()
            self.learn()
        else:
            self.learn()
            self.zombies.append((process, key, self.epochs[key]))

    @precondition(lambda self: self.model.committed)
    @rule(which=some, other=st.integers(0, 3), aside=st.booleans())
    def compute_again(self, which, other, aside):
        """Takes a shard back and writes it again, possibly with other values; shards computed from it become stale."""
        key = self.choose(which, self.model.committed)
        take_back(Storage(self.url), *key)
        self.forget(key)
        if key[1] < self.model.num_shards and (attempt := self.compute(key, other, aside)) is not None:
            self.finish(self.stepped(attempt.write, spec_of(self.model.num_shards)), key, self.epochs[key])
        self.tell("computed again")

    def finish(self, process, key, epoch):
        """Lets a writer continue to its end."""
        try:
            commit = process.run()
        except DamagedShardError:
            assert self.model.damaged.get(key) == "record" or epoch != self.epochs[key]
            commit = None
        if epoch != self.epochs[key] or key in self.model.damaged:
            self.settle_after_zombie(key)
        else:
            self.learn()
            assert commit.name == self.model.committed[key].name

    @precondition(lambda self: self.zombies)
    @rule(which=some, steps=moments, goes=st.booleans())
    def go_on(self, which, steps, goes):
        place = which % len(self.zombies)
        process, key, epoch = self.zombies[place]
        late = epoch != self.epochs[key]
        self.tell(f"{'late ' if late else ''}zombie goes on")
        if late:  # it may delete files that separate other writers
            self.epochs[key] += 1
        if goes:
            self.zombies.pop(place)
            self.finish(process, key, epoch)
            return
        with contextlib.suppress(DamagedShardError):
            process.advance(steps)
        if late or key in self.model.damaged:
            self.settle_after_zombie(key)
        else:
            self.learn()

    @precondition(lambda self: self.model.committed)
    @rule(which=some, array=some, place=some, other=some,
          damage=st.sampled_from(["flip", "cut", "empty", "gone", "swap"]))  # fmt: skip
    def damage_object(self, which, array, place, other, damage):
        key = self.choose(which, self.model.committed)
        storage = Storage(self.url)
        arrays = layout.layer_arrays(key[0])
        paths = [layout.object_path(key[0], spec, key[1]) for spec in arrays]
        (data,) = storage.get_many([path := paths[array % len(paths)]], [2**20])
        if not data:
            return
        changed = {"flip": bytearray(data), "cut": data[: place % len(data)], "empty": b"", "gone": None}.get(damage)
        if damage == "flip":
            changed[place % len(data)] ^= 1 << other % 8
        elif damage == "swap":
            swapped = layout.object_path(key[0], arrays[array % len(paths)], other % MOST_SHARDS)
            (changed,) = storage.get_many([swapped], [2**20])
        self.harm(key, path, data, changed)
        self.tell(f"object: {damage}")

    @precondition(lambda self: self.model.committed)
    @rule(which=some, place=some, other=some, damage=st.sampled_from(["flip", "cut", "empty", "gone"]))
    def damage_record(self, which, place, other, damage):
        key = self.choose(which, self.model.committed)
        if not (found := self.records(key)):
            return
        path = f"{commits_folder(key[0])}/{found[0]}"
        data = bytearray(Storage(self.url).get(path))
        if not data:
            return
        self.tell(f"record: {damage}")
        if damage == "gone":
            self.overwrite(path, None)
            if len(found) == 1:
                self.model.committed.pop(key)
                self.model.damaged.pop(key, None)
                self.epochs[key] += 1
            else:
                self.settle(key)
            return
        if damage == "flip":
            data[place % len(data)] ^= 1 << other % 8
        else:
            data = data[: place % len(data)] if damage == "cut" else b""
        self.harm(key, path, None, bytes(data))

    def harm(self, key, path, data, changed):
        """Changes a file. A change to an intact shard must be detected; one to a damaged shard may repair it."""
        intact = key not in self.model.damaged
        self.overwrite(path, changed)
        self.settle(key)
        assert not intact or data == changed or key in self.model.damaged

    @rule(num=st.integers(1, 2), version=st.integers(1, 3), steps=st.none() | moments)
    def append(self, num, version, steps):
        if self.model.extent < self.model.num_shards or self.model.num_shards + num > MOST_SHARDS:
            return
        part = version, num
        if self.model.pending is None:
            self.model.pending = part
        new = Append(data=data_spec(version), first_shard=self.model.num_shards, num_shards=num)
        attempts = []
        if part == self.model.pending:
            attempts = [self.model.documents(self.model.num_shards + i) for i in range(num)]
            for attempt in attempts:
                self.staged.setdefault(attempt.key, {})[attempt.name] = attempt
                self.attempts[(*attempt.key, attempt.name)] = attempt
        number = len(self.model.parts)
        process = self.stepped(add_documents, spec_of(self.model.num_shards), number, new, attempts)
        try:
            if steps is None:
                assert process.run() == (part == self.model.pending)
            else:
                process.advance(steps)
        except DamagedShardError:
            assert any(self.model.damaged.get(attempt.key) == "record" for attempt in attempts)
        process.kill()
        self.tell("append" if steps is None else "append killed")
        self.learn()
        names = Storage(self.url).names(appends.FOLDER)
        if f"{number:06d}.json" in names:
            self.model.parts.append(self.model.pending)
            self.model.pending = None
            self.grow()
            self.tell("append published")
        elif f"{number:06d}.claim" not in names:
            self.model.pending = None

    @rule()
    def verify_finds_all(self):
        found = verify(Store(Storage(self.url)), num_threads=1)
        assert {(problem.layer, problem.shard) for problem in found} == self.model.problems
        self.tell("verified" if found else "verified, intact")

    @rule(steps=st.none() | moments)
    def repair_all(self, steps):
        problems = verify(Store(Storage(self.url)), num_threads=1)
        behind = {key for key in {*self.model.committed, *self.staged} if key[1] >= self.model.num_shards}
        process = self.stepped(lambda storage: repair(Store(storage), problems))
        self.tell("repair" if steps is None else "repair killed")
        if steps is None:
            process.run()
        else:
            process.advance(steps)
            process.kill()
        for key in self.model.problems | behind:
            self.epochs[key] += 1
        self.learn(may_vanish=self.model.problems | behind)
        if steps is None:
            assert not {*self.model.committed} & behind
            assert self.model.problems == set()
            assert verify(Store(Storage(self.url)), num_threads=1) == []
        if f"{len(self.model.parts):06d}.claim" not in Storage(self.url).names(appends.FOLDER):
            self.model.pending = None

    @rule()
    def open_reader(self):
        self.readers = [*self.readers[-2:], (Store(Storage(self.url)), dict(self.model.committed), self.model.extent)]

    @precondition(lambda self: self.readers)
    @rule(which=some)
    def read_with_an_old_reader(self, which):
        store, seen, extent = self.readers[which % len(self.readers)]
        assert store.num_shards == extent
        assert store.num_documents == sum(len(seen["tokens", shard].lengths) for shard in range(extent))
        for key in [(layer, shard) for layer in LAYERS for shard in range(extent)]:
            try:
                values = store.reader.read_layers(key[1], (key[0],))
                store.reader.assemble(values)
            except (LayerNotFoundError, DamagedShardError, IdentityError):
                changed = any(seen.get(link) is not self.model.committed.get(link) for link in self.model.chain(key))
                assert changed or self.model.errors(key)
            else:
                assert equal(values[key[0]].arrays, seen[key].arrays)
        self.tell("read with an old reader")

    @invariant()
    def a_reader_sees_what_the_model_says(self):
        if not hasattr(self, "url"):
            return
        store = Store(Storage(self.url))
        assert store.spec.num_shards == self.model.num_shards
        assert store.num_shards == self.model.extent
        assert set(store.layers) == set(LAYERS)
        shown = [self.model.committed["tokens", shard] for shard in range(self.model.extent)]
        assert store.num_documents == sum(len(attempt.lengths) for attempt in shown)
        assert store.num_rows == sum(len(attempt.mask) for attempt in shown)
        for key in [(layer, shard) for layer in LAYERS for shard in range(self.model.num_shards)]:
            if errors := self.model.errors(key):
                with pytest.raises(errors):
                    store.reader.assemble(store.reader.read_layers(key[1], (key[0],)))
            else:
                values = store.reader.read_layers(key[1], (key[0],))
                shard = store.reader.assemble(values)
                assert equal(values[key[0]].arrays, self.model.committed[key].arrays)
                np.testing.assert_array_equal(shard.loss_mask, self.model.committed[key].mask)


def test_reader_sees_the_committed_values_after_every_event(monkeypatch):
    # Each sync takes a millisecond, and has an effect only if the power is cut.
    monkeypatch.setattr(os, "fsync", lambda _: None)
    profile = settings(
        max_examples=int(EXAMPLES or 30), stateful_step_count=30, derandomize=EXAMPLES is None, deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )  # fmt: skip
    told.clear()
    try:
        run_state_machine_as_test(StoreMachine, settings=profile)
    finally:
        if EXAMPLES:
            print(*(f"{num:8,} {what}" for what, num in sorted(told.items())), sep="\n")  # noqa: T201
    assert told["append published"] > 0
    assert told["repair"] > 0
