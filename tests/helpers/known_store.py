"""A store and a model of its contents that is kept up to date while writers are killed.

A killed writer cannot report how far it came, so the model is updated from the commit records in the store.
"""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections import Counter

import fsspec

from logitstore.inspection.verify import check_shard
from logitstore.storage.storage import Storage
from logitstore.store.commits.index import commits_folder
from logitstore.store.reader import Store
from tests.helpers.stepping import Process, SteppedStorage, watch
from tests.helpers.store_model import LAYERS

told = Counter()
"""How often each kind of event happened, over all examples."""


class KnownStore:
    """A store on disk or in memory, the model of its contents, and the writers that may still change it."""

    def begin(self, kind, model):
        self.folder = tempfile.mkdtemp() if kind == "local" else None
        self.url = f"{self.folder}/s" if self.folder else f"memory://{uuid.uuid4().hex}"
        if self.folder:
            watch(self.url)
        self.model = model
        self.staged = {}
        """Attempts that may still be published: by layer and shard, then by the names of their records."""
        self.attempts = {}
        """All attempts ever made, by layer, shard and record name."""
        self.epochs = Counter()
        """By layer and shard: how often its staged objects were deleted. Writers from before may still do damage."""
        self.zombies, self.readers = [], []

    def teardown(self):
        for process, *_ in getattr(self, "zombies", ()):
            process.kill()
        if getattr(self, "folder", None):
            shutil.rmtree(self.folder)
        elif hasattr(self, "url"):
            fsspec.filesystem("memory").rm(Storage(self.url).root, recursive=True)

    def tell(self, what):
        told[what] += 1

    def stepped(self, function, *args):
        storage = (Storage if self.folder else SteppedStorage)(self.url)
        return Process(lambda: function(storage, *args))

    def records(self, key):
        names = Storage(self.url).names(commits_folder(key[0]))
        return [name for name in names if name.startswith(f"{key[1]:06d}-") and name.endswith(".json")]

    def forget(self, key):
        """Updates the model after a shard was taken back: its staged objects, and those computed from it, are gone."""
        self.model.committed.pop(key, None)
        self.model.damaged.pop(key, None)
        for layer in LAYERS[LAYERS.index(key[0]) :]:
            if key[0] in ("tokens", "target") or layer == key[0]:
                self.staged.pop((layer, key[1]), None)
                self.epochs[layer, key[1]] += 1

    def learn(self, may_vanish=()):
        """Updates the model from the records. Committed shards must still be; staged ones may have become committed."""
        for key in {*self.model.committed, *self.staged, *may_vanish}:
            found = self.records(key)
            if key in self.model.committed:
                if not found and key in may_vanish:
                    self.forget(key)
                elif self.model.damaged.get(key) != "record":
                    assert found == [self.model.committed[key].name], key
            elif found:
                (name,) = found
                self.model.committed[key] = self.staged[key][name]

    def settle(self, key):
        """Updates the model for one shard that a writer from before a repair may have damaged or completed."""
        found = self.records(key)
        if found:
            self.model.committed[key] = self.attempts[(*key, found[0])]
            self.model.damaged.pop(key, None)
            problem = check_shard(Store(Storage(self.url)), *key)
            if problem is not None and not problem.reason.startswith("stale"):
                self.model.damaged[key] = "record" if "commit record" in problem.reason else "objects"
        else:
            assert key not in self.model.committed

    def settle_after_zombie(self, key):
        before = key in self.model.damaged
        self.settle(key)
        if before != (key in self.model.damaged):
            self.tell("healed by a zombie" if before else "damaged by a zombie")

    def overwrite(self, path, data):
        storage = Storage(self.url)
        full = f"{storage.root}/{path}"
        if data is None:
            storage._fs.rm_file(full)
        else:
            storage._fs.pipe_file(full, bytes(data))
