"""A store with room for one shard, three writers with different values for it, and the checks of the outcome."""

from __future__ import annotations

import contextlib
import re
import shutil

import numpy as np

from logitstore.errors import LayerNotFoundError
from logitstore.format import layout, zarr_objects
from logitstore.format.commit import commit_bytes, layer_digest, make_commit
from logitstore.format.spec import DataSpec, StoreSpec, TokenizerSpec, maker
from logitstore.inspection.verify import verify
from logitstore.rows.tokens import encode_tokens
from logitstore.storage.storage import Storage
from logitstore.store import writer
from logitstore.store.commits import protocol
from logitstore.store.reader import Store
from tests.helpers.stepping import Process, content, put_back, stepped_storage, stepped_url

SPEC = StoreSpec(
    tokenizer=TokenizerSpec(name="none", fingerprint=f"sha256:{'0' * 64}", vocab_size=6, chat_template=None),
    data=DataSpec(source="none", digest=None, columns="input_ids", mask_policy="given"),
    max_length=4, shard_rows=8, num_shards=1,
)  # fmt: skip


def attempt(ids, mask, lengths):
    """Returns the record and the objects that one writer would commit as shard 0."""
    values = encode_tokens(np.array(ids), np.array(mask), np.array(lengths))
    encoded = {array.name: zarr_objects.encode(values[array.name], array, shard_rows=8, k=1) for array in layout.TOKENS}
    sizes = {"documents": len(lengths), "rows": len(ids), "counted": sum(mask), "computed_from": None, "seconds": 0.0}
    return make_commit("tokens", 0, values, made_by=maker(SPEC), **sizes), encoded


# The three have different lengths. B has no object for its loss mask: an array of fill values is not stored.
A = attempt([4, 1, 3, 5, 1, 2, 0], [0, 1, 1, 0, 1, 1, 0], [4, 3])
B = attempt([2, 2, 3], [0, 0, 0], [2, 1])
C = attempt([5, 4, 5, 4, 5], [1, 1, 1, 0, 0], [4, 1])
EVERYBODY = (A, B, C)


class World:
    """An empty store on one kind of storage, which can be reset to empty."""

    def __init__(self, url):
        self.url = url
        writer.create_store(Storage(url), SPEC)
        self.is_local = Storage(url).is_local
        self._empty = self.content()

    def process(self, function, *args, storage=None):
        stepped = storage or stepped_storage(self.url)
        return Process(lambda: function(stepped, *args))

    def writer(self, attempt, storage=None):
        return self.process(protocol.publish, *attempt, storage=storage)

    def content(self):
        return content(self.url)

    def restore(self, files=None):
        """Resets the store to empty, or to the files that `content` returned earlier."""
        fs, root = Storage(self.url)._fs, Storage(self.url).root
        if self.is_local:
            for name in ("staging", "commits", *(f"tokens/{array.name}/c" for array in layout.TOKENS)):
                shutil.rmtree(f"{root}/{name}", ignore_errors=True)
        else:
            for path in self.content():
                del fs.store[f"{root}/{path}"]
        put_back(self.url, self._empty if files is None else files)


@contextlib.contextmanager
def make_world(kind, tmp_path, monkeypatch):
    """Provides a World on the local disk or in memory."""
    with stepped_url(kind, tmp_path, monkeypatch) as url:
        yield World(url)


def whose(world, candidates=EVERYBODY):
    """Reads the store and returns the attempt that is committed, after checking its values; None if there is none."""
    store = Store(Storage(world.url))
    try:
        arrays = store.reader.read_arrays("tokens", 0)
    except LayerNotFoundError:
        return None
    commit = store.reader.commit("tokens", 0)
    (found,) = [candidate for candidate in candidates if candidate[0] == commit]
    assert layer_digest("tokens", arrays) == commit.digest
    assert store.num_rows == commit.rows
    return found


def check_finished(world, candidates=EVERYBODY, *, stopped=False):
    """Checks that the store has exactly the files that a single writer would have left.

    With `stopped`, partial files beside the commit record are allowed: a writer that was stopped while it wrote a
    record leaves one.
    """
    commit, encoded = whose(world, candidates)
    expected = {layout.object_path("tokens", array, 0): encoded[array.name] for array in layout.TOKENS}
    expected = {path: data for path, data in expected.items() if data is not None}
    expected |= {f"commits/tokens/{commit.name}": commit_bytes(commit)} | world._empty
    content = world.content()
    if stopped:
        content = {path: data for path, data in content.items() if not re.fullmatch("commits/.*[.]partial", path)}
    else:
        assert verify(Store(Storage(world.url)), num_threads=1) == []
    assert content == expected
    return commit


def num_steps(world, function, *args):
    """Returns the number of steps that a process takes in an empty store."""
    world.restore()
    process = world.process(function, *args)
    process.run()
    world.restore()
    return len(process.steps)
