"""Sources of file system options, and the rule that no message shows their values."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import traceback

import fsspec
import pytest

import logitstore
from logitstore.errors import StorageError
from logitstore.storage.options import VARIABLE, storage_options
from logitstore.storage.storage import Storage
from tests.helpers.faults import S3Server, s3_options

OPTIONS = {"key": "k", "secret": "hunter2", "client_kwargs": {"region_name": "eu-west-1"}}


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.fixture
def options_file(tmp_path):
    path = tmp_path / "options.json"
    path.write_text(json.dumps(OPTIONS))
    return str(path)


def test_options_come_from_a_file(options_file):
    assert storage_options(options_file) == OPTIONS


@pytest.mark.parametrize("value", [None, "", " \n"])
def test_options_are_none_without_file_and_variable(monkeypatch, value):
    if value is not None:
        monkeypatch.setenv(VARIABLE, value)
    assert storage_options(None) is None


def test_variable_contains_a_path_or_the_options(monkeypatch, options_file):
    monkeypatch.setenv(VARIABLE, options_file)
    assert storage_options(None) == OPTIONS
    monkeypatch.setenv(VARIABLE, f"\n {json.dumps(OPTIONS)}")
    assert storage_options(None) == OPTIONS


def test_a_file_wins_over_the_variable(monkeypatch, options_file):
    monkeypatch.setenv(VARIABLE, '{"key": "other", "token": "t"}')
    assert storage_options(options_file) == OPTIONS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"secret": "hunter2"', r"with an error at line 1 column 21; write \{"),
        (b'{"a": 1,\n "secret": hunter2}', "with an error at line 2 column 12;"),
        (b'{"secret": "hunter2\\x"}', "with an error at line 1 column 20;"),
        (b'{"secret": "hunter2\xff"}', "with an error at byte 19;"),
        (b'["hunter2"]', "with a list, not an object;"),
        (b'"hunter2"', "with a str, not an object;"),
        (b"", "with an error at line 1 column 1;"),
    ],
)
@pytest.mark.parametrize("is_variable", [False, True])
def test_malformed_options_file_is_refused_without_showing_it(monkeypatch, tmp_path, content, message, is_variable):
    path = tmp_path / "options.json"
    path.write_bytes(content)
    monkeypatch.setenv(VARIABLE, str(path))
    shown = "the path of a file" if is_variable else f"storage_options={path}"
    name = VARIABLE if is_variable else "storage_options"
    with pytest.raises(ValueError, match=f"^{name} must be a JSON file with an object, got {shown} {message}") as error:
        storage_options(None if is_variable else str(path))
    assert_hides(error.value, "hunter2")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('{"secret": "hunter2"', "got a value with an error at line 1 column 21;"),
        ('{"secret": hunter2}', "got a value with an error at line 1 column 12;"),
        # A value that was meant as JSON may look like a path.
        ('\'{"secret": "hunter2"}\'', r"got a value, not shown, that does not begin with \{ \(No such file"),
        ('"secret": "hunter2"', r"got a value, not shown, that does not begin with \{ \(No such file"),
        ("/nowhere/hunter2.json", r"got a value, not shown, that does not begin with \{ \(No such file"),
    ],
)
def test_malformed_variable_is_refused_without_showing_its_value(monkeypatch, value, message):
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(ValueError, match=rf"^{VARIABLE} must be a JSON file.*, {message}") as error:
        storage_options(None)
    assert_hides(error.value, "hunter2")


def assert_hides(error, secret):
    assert secret not in "".join(traceback.format_exception(error))
    # Ray pickles the exceptions of tasks, so no exception in the chain may contain the text.
    assert error.__context__ is None
    assert secret.encode() not in pickle.dumps(error)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"must be a JSON file, got storage_options=.*no.json \(No such file or dir"):
        storage_options(str(tmp_path / "no.json"))
    with pytest.raises(ValueError, match=r"\(Is a directory\); give the path of a file that can be read"):
        storage_options(str(tmp_path))


def test_options_given_instead_of_a_path_are_not_shown():
    with pytest.raises(ValueError, match="must be the path of a JSON file, got JSON itself") as error:
        storage_options('{"secret": "hunter2"}')
    assert "hunter2" not in str(error.value)


PICKLE_STORAGE = """
import pickle, sys
from logitstore.storage.storage import Storage
sys.stdout.buffer.write(pickle.dumps(Storage("s3://bucket/c", {"endpoint_url": sys.argv[1]})))
"""
USE_PICKLED_STORAGE = """
import pickle, sys
storage = pickle.load(sys.stdin.buffer)
storage.put("by_another.json", b"{}")
print(storage.names(""))
"""


def test_pickled_storage_includes_the_configuration_of_fsspec(tmp_path):
    """It reaches the bucket from a process without FSSPEC_S3_* variables, such as an actor on another machine."""
    (tmp_path / "a.json").write_text('{"s3": {"key": "from_file", "endpoint_url": "http://not.this.one"}}')
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("FSSPEC", "AWS"))}
    bare |= {"HOME": str(tmp_path), "AWS_EC2_METADATA_DISABLED": "true"}
    configured = bare | {"FSSPEC_CONFIG_DIR": str(tmp_path), "FSSPEC_S3_SECRET": "hunter2"}
    with S3Server() as server:
        server.make_bucket("bucket")
        command = [sys.executable, "-c", PICKLE_STORAGE, server.url]
        pickled = subprocess.run(command, env=configured, capture_output=True, check=True).stdout
        assert b"hunter2" in pickled
        command = [sys.executable, "-c", USE_PICKLED_STORAGE]
        done = subprocess.run(command, env=bare, input=pickled, capture_output=True, check=True)
    assert done.stdout == b"['by_another.json']\n"


def test_representations_and_errors_never_show_options(tmp_path, tiny_store, monkeypatch):
    monkeypatch.setattr("logitstore.storage.storage.FIRST_PATIENCE_S", 0.1)
    with S3Server() as server:
        server.make_bucket("bucket")
        options = s3_options(server.url) | {"client_kwargs": {"region_name": "eu-hunter2-1"}}
        fsspec.filesystem("s3", **options).put(f"{tiny_store}/", "bucket/c.zarr/", recursive=True)
        store = logitstore.open("s3://bucket/c.zarr", options, cache_dir=str(tmp_path))
        shown = [store, store.storage, store.storage.cache, *store.layers.values(), store.spec]
        failing = [
            lambda: logitstore.open("s3://bucket/no.zarr", options),
            lambda: logitstore.open("s3://nobucket/no.zarr", options),
            lambda: Storage("s3://nobucket/no.zarr", options).put("zarr.json", b""),
            lambda: store.reader.commit("target", 1000),
            lambda: store.loss("nobody"),
            lambda: store[10**6],
            lambda: logitstore.open("s3://bucket/c.zarr", options | {"endpoint": "unknown"}),
            lambda: logitstore.open("s3://bucket/c.zarr", options | {"key": None, "secret": None, "profile": "no"}),
        ]
        for fail in failing:
            with pytest.raises(Exception) as error:  # noqa: PT011
                fail()
            shown += [repr(error.value), *traceback.format_exception(error.value)]
    with pytest.raises(StorageError) as error:
        logitstore.open("s3://bucket/c.zarr", options)
    shown += traceback.format_exception(error.value)
    assert not any("hunter2" in text for value in shown for text in (str(value), repr(value)))
