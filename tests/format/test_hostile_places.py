"""Hostile stores: names, links, special files and pickles. See helpers/hostile.py."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

import logitstore
from logitstore.errors import LogitStoreError, StorageRefusedError
from logitstore.format import layout
from logitstore.format.spec import LossSpec
from logitstore.storage.storage import Storage
from logitstore.store import writer
from logitstore.store.commits import protocol
from tests.helpers import stores
from tests.helpers.hostile import FILES, check, listing
from tests.helpers.paths import ROOT


@pytest.fixture
def url(small_store, tmp_path):
    """A copy of a valid store, which the test makes invalid."""
    return stores.copy(small_store, tmp_path / "cache.zarr")


# Names of layers, and special files in the place of files and folders


@pytest.mark.parametrize(
    "name", ["..", ".hidden", "a b", "x" * 65, "x.json", "é", "-a", "a\nb", "\x1b[2J", "%2e%2e", "~root", "$HOME"]
)
def test_losses_folder_with_an_invalid_name_is_ignored(reader, url, name):
    if name != "..":
        shutil.copytree(Path(url, "losses/ref"), Path(url, "losses", name))
        shutil.copytree(Path(url, "commits/losses/ref"), Path(url, "commits/losses", name))
    outcomes = check(reader, url, {"open": "", "info": "", "shard 1": ""})
    assert not outcomes["dataset of losses"]
    assert sorted(logitstore.open(url).layers) == sorted(stores.LAYERS)


NAMES = [
    "", ".", "..", "../x", "a/b", "a/../../x", "/etc/x", "//x", "\\x", "a\\..\\b", ".hidden", "x" * 65, "x" * 10**6,
    "zarr.json", "x.json", "a b", "a\nb", "ref\n", "a\0b", "é", "٣", "-a", "_a", "~", "s3://b/x", "a%2fb", "::",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_writing_refuses_names_that_lead_out_of_the_store(url, name):
    before = listing(Path(url).parent)
    storage, spec = Storage(url), logitstore.open(url).spec
    loss = LossSpec(model=stores.MODEL)
    for action in (
        lambda: layout.losses_layer(name),
        lambda: writer.add_layer(storage, spec, f"losses/{name}", loss),
        lambda: writer.add_layer(storage, spec, name, loss),
        lambda: layout.layer_arrays(f"losses/{name}"),
    ):
        with pytest.raises((ValueError, LogitStoreError)):
            action()
    with pytest.raises(logitstore.LayerNotFoundError):
        logitstore.open(url).loss(name)
    with pytest.raises((ValueError, LogitStoreError)):
        writer.LayerWriter(storage, spec, f"losses/{name}")
    assert listing(Path(url).parent) == before


KINDS = ["fifo", "folder", "link to itself", "link to a device", "link out", "socket"]
FOLDERS = ["tokens", "target/gaps/c", "commits/target", "losses", "losses/ref", "appends"]


def replace(path, kind):
    """Replaces a file by a special file, a folder or a link."""
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        os.mknod(path, 0o140600)
    elif kind == "file":
        path.write_text("{}")
    else:
        targets = {"link to itself": path.name, "link to a device": "/dev/zero"}
        path.symlink_to(targets.get(kind, "/etc/passwd"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("file", ["zarr.json", "target/zarr.json", "tokens/ids/zarr.json", "tokens/ids/c/1", "commit"])
def test_special_file_in_the_place_of_a_file_does_not_block_the_reader(reader, url, file, kind):
    path = stores.record(url, "target", 1) if file == "commit" else Path(url, file)
    replace(path, kind)
    outcomes = check(reader, url, {})
    if file != "tokens/ids/zarr.json":
        assert any(outcomes.values())


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("kind", ["fifo", "link to itself", "link out", "file"])
def test_special_file_in_the_place_of_a_folder_does_not_block_the_reader(reader, url, folder, kind):
    path = Path(url, folder)
    if path.exists():
        shutil.rmtree(path)
    path.touch()
    replace(path, kind)
    check(reader, url, {})


def test_circular_links_are_not_followed(reader, url):
    for folder in ("tokens/ids/c", "commits/target", "losses", "losses/ref"):
        for name in ("a", "b", "c"):
            Path(url, folder, name).symlink_to("..")
    check(reader, url, {})


def test_nothing_outside_is_written_or_deleted_through_a_link(url, tmp_path):
    """Links may be read, because downloaded snapshots consist of links, but nothing is written through them."""
    victim = tmp_path / "victim"
    (victim / "000001").mkdir(parents=True)
    (victim / "000001/precious").write_text("x")
    for folder in ("staging", "commits/target", "target/tail/c"):
        shutil.rmtree(Path(url, folder), ignore_errors=True)
        Path(url, folder).symlink_to(victim)
    for name in ("0", "1", "zarr.json", "target"):
        (victim / name).mkdir() if name == "target" else (victim / name).write_text("precious")
    (victim / "target/000001").mkdir()
    (victim / "target/000001/winner.json").write_text("{}")
    before = listing(victim)
    storage = Storage(url)
    for action in (
        lambda: protocol.clean(storage, "target", 1),
        lambda: storage.put("target/tail/c/1", b"x"),
        lambda: storage.create("target/tail/c/7", b"x"),
        lambda: storage.copy("tokens/ids/c/1", "target/tail/c/1"),
        lambda: storage.remove("target/tail/c/1"),
        lambda: storage.remove_folder("staging/target"),
        lambda: storage.put("../victim/1", b"x"),
        lambda: storage.remove_folder("../victim"),
    ):
        with pytest.raises(StorageRefusedError, match="leads out of the store"):
            action()
    assert listing(victim) == before


# Records of shards set aside, and staged writes


def test_invalid_records_of_shards_set_aside_do_no_harm(reader, url):
    for layer in ("tokens", "target", "losses/ref"):
        folder = Path(url, "set_aside", layer)
        folder.mkdir(parents=True)
        for i, (name, content) in enumerate(FILES.items()):
            (folder / f"{i:06d}.json").write_bytes(content if name != "many small values" else b"[]")
        for name in ("..json", "999999999999.json", "-00001.json", "\x1b[2J.json", "000001.json.json"):
            (folder / name).write_text("{}")
        (folder / "000002.json").unlink()
        (folder / "000002.json").symlink_to("/dev/zero")
        os.mkfifo(folder / "000099.json")
    check(reader, url, {"open": "", "shard 1": ""}, seconds=8)


WINNERS = [
    {}, [], None, 1, "x",
    {"attempt": 5, "objects": [], "name": "x", "commit": "{}"},
    {"attempt": "0" * 32, "objects": 5, "name": "x", "commit": "{}"},
    {"attempt": "0" * 32, "objects": [[]], "name": "x", "commit": "{}"},
    {"attempt": "0" * 32, "objects": {"tail": 1}, "name": "x", "commit": "{}"},
    {"attempt": "0" * 32, "objects": ["../../../x"], "name": "x", "commit": "{}"},
    {"attempt": "../../../../victim", "objects": ["tail"], "name": "x", "commit": "{}"},
    {"attempt": "0" * 32, "objects": ["tail"], "name": "../../../x", "commit": "{}"},
    {"attempt": "0" * 32, "objects": ["tail"], "name": "x", "commit": "\ud800"},
    {"attempt": "0" * 32, "objects": ["tail"], "name": "x", "commit": {"a": 1}},
    {"attempt": int("1" * 32), "objects": ["tail"], "name": "x", "commit": "{}"},
]  # fmt: skip


@pytest.mark.parametrize("winner", WINNERS, ids=range(len(WINNERS)))
def test_malformed_winner_file_is_replaced(url, small_store, tmp_path, winner):
    stores.record(url, "target", 1).unlink()
    for layer in ("losses/ref", "losses/draft"):
        stores.record(url, layer, 1).unlink()
    folder = Path(url, protocol.staging("target", 1))
    folder.mkdir(parents=True)
    (folder / f"{protocol.WINNER}-0.json").write_text(json.dumps(winner))
    before = {path for path in tmp_path.rglob("*") if Path(url) not in path.parents}
    values, commit = stores.read(small_store, "target", 1)
    sizes = {name: getattr(commit, name) for name in ("documents", "rows", "counted", "set_aside", "computed_from")}
    spec = logitstore.open(url).spec
    written = writer.LayerWriter(Storage(url), spec, "target").write(1, values, started=0.0, **sizes)
    assert written.digest == commit.digest
    assert logitstore.verify(logitstore.open(url)) == []
    assert {path for path in tmp_path.rglob("*") if Path(url) not in path.parents} == before


# Nothing that is stored is ever executed


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self._path = path

    def __reduce__(self):
        return Path.touch, (self._path,)


def test_pickles_in_a_store_are_never_loaded(reader, small_store, tmp_path):
    trap = tmp_path / "sprung"
    bait = pickle.dumps(Trap(trap))
    np.save(tmp_path / "bait.npy", np.array([Trap(trap)], dtype=object), allow_pickle=True)
    baits = [bait, (tmp_path / "bait.npy").read_bytes(), stores.one_chunk(bait + bytes(100))]
    files = sorted(path.relative_to(small_store) for path in Path(small_store).rglob("*") if path.is_file())
    files = [file for file in files if file.name in ("1", "zarr.json") or file.name.startswith("000001")]
    for i, file in enumerate(files):
        url = tmp_path / "cache.zarr"
        shutil.copytree(small_store, url)
        (url / file).write_bytes(baits[i % len(baits)])
        for name in ("pickle.pkl", "target.npy", "__init__.py", "commits/target/000009.pkl"):
            (url / name).write_bytes(bait)
        outcomes = reader.read(str(url), steps=["shard 1"])
        assert not [outcome for outcome in outcomes.values() if str(outcome).startswith("BAD")]
        shutil.rmtree(url)
    assert not trap.exists()
    pickle.loads(bait)
    assert trap.exists()  # loading the pickle does create the file


FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "jsonpickle", "runpy"}
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "np.load", "numpy.load", "np.loadtxt", "np.genfromtxt", "torch.load",
    "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "subprocess.run", "subprocess.Popen",
    "zarr.open", "zarr.open_group", "zarr.open_array", "numcodecs.get_codec",
}  # fmt: skip


def test_logitstore_never_imports_or_calls_code_that_executes_data():
    for path in sorted((ROOT / "logitstore").rglob("*.py")):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            where = f"{path.name}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import):
                names = {alias.name.split(".")[0] for alias in node.names}
                assert not names & FORBIDDEN_MODULES, where
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in FORBIDDEN_MODULES, where
            elif isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in FORBIDDEN_CALLS, where
                pickles = [keyword.value for keyword in node.keywords if keyword.arg == "allow_pickle"]
                assert all(isinstance(value, ast.Constant) and value.value is False for value in pickles), where
