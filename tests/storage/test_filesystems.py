"""Drivers of services other than S3: asynchronous copies, refusals without an exception class, URL forms."""

from __future__ import annotations

import threading

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import logitstore
from logitstore.errors import StorageError
from logitstore.rows.tokens import encode_tokens
from logitstore.storage import storage as storage_module
from logitstore.storage.failures import is_refusal, may_pass
from logitstore.storage.options import without_credentials
from tests.helpers import stores


class LateCopies(MemoryFileSystem):
    """A service that accepts a copy and makes it a moment later from the source of that moment, as Azure may do."""

    protocol = "latecopies"
    store: dict = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    delay_s = 0.05

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.removeprefix("latecopies://"))

    def cp_file(self, path1, path2, **_):
        if not self.exists(path1):
            raise FileNotFoundError(path1)
        self.pipe_file(path2, b"")

        def finish():
            if self.exists(path1):
                self.pipe_file(path2, self.cat_file(path1))

        threading.Timer(self.delay_s, finish).start()


fsspec.register_implementation("latecopies", LateCopies, clobber=True)


def test_shard_is_committed_only_after_its_copies_exist():
    url = stores.make("latecopies://copied.zarr", num_shards=2)
    store = logitstore.open(url)
    assert logitstore.verify(store) == []
    assert len(list(store.shards())) == 2


def test_unfinished_copy_prevents_the_commit_and_loses_no_data(monkeypatch):
    monkeypatch.setattr(LateCopies, "delay_s", 30.0)
    monkeypatch.setattr(storage_module, "PATIENCE_S", 0.3)
    with pytest.raises(StorageError, match="the service has not finished its copy"):
        stores.make("latecopies://stuck.zarr", num_shards=1)
    assert len(logitstore.open("latecopies://stuck.zarr").layers["tokens"].index) == 0
    monkeypatch.setattr(LateCopies, "delay_s", 0.0)
    spec = stores.spec_of(1)
    storage = stores.create("latecopies://stuck.zarr", spec)
    stores.write_shard(storage, spec, 0, stores.shard_values(np.random.default_rng(0)))
    assert logitstore.verify(logitstore.open("latecopies://stuck.zarr")) == []


@pytest.mark.parametrize(("num", "reason"), [(2000, "[" * 40), (2000, "x" * 1000)])
def test_record_too_long_for_readers_is_not_written(tmp_path, num, reason):
    spec = stores.spec_of(1, shard_rows=2 * num)
    storage = stores.create(tmp_path / "c.zarr", spec)
    lengths, mask = np.full(num, 2), np.tile([1, 0], num)
    values = {"tokens": encode_tokens(np.zeros(2 * num), mask, lengths)}
    stores.write_shard(storage, spec, 0, values)
    empty = {name: np.full(2 * num, np.nan) for name in ("tail", "label_logprob", "entropy")}
    none = {"counts": np.zeros(2 * num), "gaps": np.zeros(0), "logprobs": np.zeros(0), "draws": np.zeros(0), **empty}
    message = f"set_aside must fit in a commit record, got {num} of {num} documents in shard 0"
    with pytest.raises(ValueError, match=message):
        stores.write_shard(storage, spec, 0, values | {"target": none}, set_aside=dict.fromkeys(range(num), reason))
    assert logitstore.open(storage.url).layers["target"].num_missing == 1


class WithStatus(Exception):
    """An exception as azure.core and gcsfs raise it: with a status number, but without a class of its own."""

    def __init__(self, **attributes):
        super().__init__("no")
        vars(self).update(attributes)


@pytest.mark.parametrize(
    ("error", "refused"),
    [
        (WithStatus(status_code=403), True),  # azure.core: AuthorizationPermissionMismatch
        (WithStatus(code=401), True),  # gcsfs
        (WithStatus(code="401"), True),
        (WithStatus(status=403), True),  # aiohttp
        (OSError("Forbidden: https://storage.googleapis.com/b/o"), True),  # gcsfs
        (OSError("Forbidden: https://x\nrateLimitExceeded"), False),
        (WithStatus(status_code=503), False),
        (WithStatus(code=429), False),
        (OSError("connection reset"), False),
    ],
)
def test_refusals_are_distinguished_from_temporary_errors(error, refused):
    assert is_refusal(error) is refused
    if not refused:
        assert may_pass(error)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://key:secret@bucket/a", "s3://bucket/a"),
        ("https://user@host/a@b", "https://host/a@b"),
        ("abfs://data@acct.dfs.core.windows.net/cache.zarr", "abfs://data@acct.dfs.core.windows.net/cache.zarr"),
        ("abfss://data:secret@acct.dfs.core.windows.net/c", "abfss://data@acct.dfs.core.windows.net/c"),
        ("az://container/c", "az://container/c"),
        ("folder/a@b", "folder/a@b"),
    ],
)
def test_urls_are_stored_and_shown_without_credentials(url, shown):
    assert without_credentials(url) == shown
