"""A store in a bucket: a real S3 server over HTTP, on loopback."""

from __future__ import annotations

import fsspec
import numpy as np
import pytest

import logitstore
from logitstore import cli
from logitstore.errors import StorageError
from logitstore.storage import Storage
from logitstore.writer import LayerWriter, create_store


@pytest.fixture(scope="module")
def bucket():
    """fsspec options of an empty bucket named `bucket`."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    options = {"key": "k", "secret": "hunter2", "endpoint_url": f"http://{host}:{port}"}
    fsspec.filesystem("s3", **options).mkdir("bucket")
    yield options
    server.stop()


def test_a_store_written_to_a_bucket_reads_the_same(bucket, tiny_store):
    local = logitstore.open(tiny_store)
    storage = Storage("s3://bucket/deep/cache.zarr", bucket)
    create_store(storage, local.spec)
    tokens = LayerWriter(storage, local.spec, "tokens")
    for shard in range(local.num_shards):
        commit = local.commit("tokens", shard)
        tokens.write(
            shard, local.read_arrays("tokens", shard), documents=commit.documents, rows=commit.rows,
            counted=commit.counted, computed_from=None, started=0.0,
        )  # fmt: skip
    remote = logitstore.open("s3://bucket/deep/cache.zarr", storage_options=bucket)
    assert (remote.num_documents, remote.num_rows) == (local.num_documents, local.num_rows)
    np.testing.assert_array_equal(remote[13].ids, local[13].ids)
    assert logitstore.verify(remote) == []
    fs = fsspec.filesystem("s3", **bucket)
    assert not any(b"hunter2" in fs.cat_file(path) for path in fs.find("bucket"))


def test_a_store_copied_into_a_bucket_is_the_same_store(bucket, tiny_store, tmp_path, capsys):
    fsspec.filesystem("s3", **bucket).put(tiny_store, "bucket/copied.zarr", recursive=True)
    remote, local = logitstore.open("s3://bucket/copied.zarr", storage_options=bucket), logitstore.open(tiny_store)
    assert sorted(remote.layers) == sorted(local.layers)
    np.testing.assert_array_equal(remote[7].rows.logprobs, local[7].rows.logprobs)
    np.testing.assert_array_equal(remote.gap("reference", "reference")[7], local.gap("reference", "reference")[7])
    options = tmp_path / "options.json"
    options.write_text(f'{{"key": "k", "secret": "hunter2", "endpoint_url": "{bucket["endpoint_url"]}"}}')
    assert cli.main(["info", "s3://bucket/copied.zarr", "--storage_options", str(options)]) == 0
    assert "hunter2" not in capsys.readouterr().out


def test_a_bucket_that_is_not_there_is_one_clear_error(bucket, tiny_store):
    spec = logitstore.open(tiny_store).spec
    with pytest.raises(StorageError, match=r"url must be one that can be written, got url=s3://nobucket/c.zarr"):
        create_store(Storage("s3://nobucket/c.zarr", bucket), spec)
