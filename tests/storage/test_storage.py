"""Locations of a store: which paths and URLs are accepted."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

import logitstore
from logitstore.commands import main as cli
from logitstore.storage.storage import Storage


@pytest.mark.parametrize("url", ["", " ", "file://", "s3://"])
def test_blank_url_is_refused_and_not_the_current_folder(url, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"^url must be a folder or a URL, got url='{url}'; "):
        Storage(url)
    assert cli.main(["info", url]) == 2
    assert capsys.readouterr().err.startswith("error: url must be a folder or a URL, got url=")


def test_root_of_the_disk_is_not_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = f"{tmp_path.name}-{os.getpid()}"
    Path(name).touch()
    storage = Storage("/")
    storage.remove(name)
    assert Path(name).exists()
    assert pickle.loads(pickle.dumps(storage)).names("") == sorted(os.listdir("/"))


def test_path_that_cannot_be_a_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"^url must be a folder or a URL, got url=\S+/file, which is a file; "):
        logitstore.open(tmp_path / "file")
    inside = Storage(tmp_path / "file" / "cache.zarr")
    for write in (inside.put, inside.create):
        with pytest.raises(ValueError, match=r"^url must be a folder that can be created, got url=\S+ \(File exists: "):
            write("zarr.json", b"{}")
    if Path("/proc/self").exists():
        with pytest.raises(ValueError, match=r"got url=/proc/e1 \(No such file or directory: /proc/e1\); give another"):
            Storage("/proc/e1").create("zarr.json", b"{}")
