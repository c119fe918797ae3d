"""Checkpoints: which are finished, and copies of them at an fsspec URL. Knows no model and no trainer.

A checkpoint is a folder of files that several processes write. Last of all comes a record of them, in one step: their
sizes, and digests of the small ones. Without it, or where a file does not fit it, it is what a killed run left.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from typing import TYPE_CHECKING, Any

from fsspec.implementations.local import LocalFileSystem
from torch import distributed

from logitstore.errors import LogitStoreError, StorageError, StorageRefusedError
from logitstore.storage.failures import is_refusal
from logitstore.storage.filesystems import open_fs
from logitstore.storage.options import without_credentials

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence
    from pathlib import Path

RECORD = "checkpoint.json"
PREFIX = "checkpoint-"
DIGESTED_BYTES = 2**20
"""Files up to this size are told by their content: reading all of the weights again would stop the training."""


class DamagedCheckpointError(StorageError):
    """What came of a checkpoint is not what its record says."""


def write_record(folder: Path) -> None:
    """Finishes a checkpoint: all its files are written."""
    files = {
        path.relative_to(folder).as_posix(): _described(path) for path in sorted(folder.rglob("*")) if _counts(path)
    }
    partial = folder / f"{RECORD}.partial"
    with partial.open("w", encoding="utf-8") as file:
        json.dump({"files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / RECORD)


def defect(folder: Path) -> str | None:
    """Says why a folder is no finished checkpoint; None if it is one."""
    files = _recorded(folder / RECORD)
    if files is None:
        return f"there is no {RECORD} in it, which is written last"
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if _described(path) != size:
            return f"{name} is not as {RECORD} says"
    return None


def finished(folder: Path) -> list[Path]:
    """Lists the finished checkpoints of a run's folder by their step."""
    found = [path for path in folder.glob(f"{PREFIX}*") if step_of(path.name) is not None and defect(path) is None]
    return sorted(found, key=lambda path: step_of(path.name) or 0)


def remove(folder: Path) -> None:
    """Deletes a checkpoint, or what is there of one; from the first moment on it is no finished one."""
    (folder / RECORD).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def rotate(folder: Path, limit: int | None, keep: Collection[Path]) -> None:
    """Deletes the oldest checkpoints of a run beyond a number, and what is left of unfinished ones.

    Args:
        folder: The run's.
        limit: How many may stay; any number where it is None or not above 0.
        keep: Those that stay in any case.
    """
    if limit is None or limit <= 0:
        return
    there = [path for path in folder.glob(f"{PREFIX}*") if step_of(path.name) is not None]
    good = [path.name for path in finished(folder)]
    for path in there:
        if path.name not in good or path.name in _beyond(good, limit, {path.name for path in keep}):
            remove(path)


def gather(folder: Path, rank: int) -> None:
    """Brings what each rank wrote for itself, in files `NAME_RANK.pth`, to the first rank's copy of a checkpoint.

    For ranks on several machines, each with a folder of its own. All ranks call it.

    Args:
        folder: The checkpoint's on this machine.
        rank: Of this process.
    """
    if not distributed.is_initialized():
        return
    own = {path.name: path.read_bytes() for path in folder.glob(f"*_{rank}.pth")}
    found: list[Any] | None = [None] * distributed.get_world_size() if rank == 0 else None
    distributed.gather_object(own, found)
    for files in found or []:
        for name, content in files.items():
            if not (folder / name).exists():
                (folder / name).write_bytes(content)


class Remote:
    """Copies of a run's finished checkpoints, and of other files of it, at an fsspec URL.

    All methods raise StorageError where the URL cannot be reached, StorageRefusedError where it says no.
    """

    def __init__(self, url: str, storage_options: dict[str, Any] | None = None) -> None:
        """Opens the URL, and asks nothing of it.

        Args:
            url: Folder of a run.
            storage_options: What its file system needs, such as credentials.

        Raises:
            MissingDriverError: No installed package opens such a URL.
        """
        self.url = without_credentials(url)
        self._fs, root = open_fs(url, storage_options)
        self._root = root.rstrip("/")

    def upload(self, folder: Path) -> None:
        """Copies a finished checkpoint, its record last."""
        self.remove(folder.name)
        self.put({f"{folder.name}/{name}": folder / name for name in _recorded(folder / RECORD) or {}})
        self.put({f"{folder.name}/{RECORD}": folder / RECORD})

    def put(self, files: Mapping[str, Path]) -> None:
        """Copies files to names below the URL, in no order, in the place of what is there."""
        targets = {f"{self._root}/{name}": str(path) for name, path in files.items()}
        with self._reached():
            if isinstance(self._fs, LocalFileSystem):  # others make folders themselves; S3 would make a new bucket
                for parent in {target.rpartition("/")[0] for target in targets}:
                    self._fs.makedirs(parent, exist_ok=True)
            self._fs.put(list(targets.values()), list(targets))

    def finished(self) -> list[str]:
        """Lists the names of the finished checkpoints by their step."""
        with self._reached():
            return [name for name in self._there() if self._is_finished(name)]

    @contextlib.contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except LogitStoreError:
            raise
        except Exception as error:  # drivers raise whatever their services' libraries do
            kind = StorageRefusedError if is_refusal(error) else StorageError
            raise kind(
                f"url must be one that can be read and written, got url={self.url} ({type(error).__name__}: "
                f"{' '.join(str(error).split()):.300}); check the bucket, the credentials and --storage_options"
            ) from error

    def _there(self) -> list[str]:
        self._fs.invalidate_cache()
        if not self._fs.exists(self._root):
            return []
        names = {path.rstrip("/").rpartition("/")[2] for path in self._fs.ls(self._root, detail=False)}
        return sorted((name for name in names if step_of(name) is not None), key=lambda name: step_of(name) or 0)

    def _is_finished(self, name: str) -> bool:
        folder = f"{self._root}/{name}"
        sizes = {path: info["size"] for path, info in self._fs.find(folder, detail=True).items()}
        sizes = {path.rpartition(f"/{name}/")[2]: size for path, size in sizes.items()}
        if RECORD not in sizes:
            return False
        files = _parsed(self._fs.cat_file(f"{folder}/{RECORD}"))
        return files is not None and all(sizes.get(path) == info.get("bytes") for path, info in files.items())

    def fetch(self, name: str, folder: Path) -> Path:
        """Copies a finished checkpoint into a run's local folder, and returns it there.

        Raises:
            DamagedCheckpointError: What came is not what its record says.
        """
        local, partial = folder / name, folder / f"{name}.partial"
        for stale in (local, partial):
            remove(stale)
        source = f"{self._root}/{name}"
        with self._reached():
            files = _parsed(self._fs.cat_file(f"{source}/{RECORD}")) or {}
        for path in (RECORD, *files):
            (partial / path).parent.mkdir(parents=True, exist_ok=True)
        with self._reached():
            self._fs.get([f"{source}/{path}" for path in files], [str(partial / path) for path in files])
            self._fs.get_file(f"{source}/{RECORD}", str(partial / RECORD))
        if reason := defect(partial):
            raise DamagedCheckpointError(
                f"checkpoint must be as it was finished, got {self.url}/{name}: {reason}; go on from another one"
            )
        partial.replace(local)
        return local

    def remove(self, name: str) -> None:
        """Deletes a checkpoint, its record first, or a file; does nothing where there is none."""
        folder = f"{self._root}/{name}"
        with self._reached():
            self._fs.invalidate_cache()
            if not self._fs.exists(folder):
                return
            if self._fs.exists(f"{folder}/{RECORD}"):
                self._fs.rm_file(f"{folder}/{RECORD}")
            if self._fs.exists(folder):  # a bucket has no folders: none is left without files
                self._fs.rm(folder, recursive=True)

    def rotate(self, limit: int | None, keep: Collection[str]) -> None:
        """Deletes the oldest checkpoints beyond a number, and what is left of unfinished ones; as `rotate` does."""
        if limit is None or limit <= 0:
            return
        good = self.finished()
        with self._reached():
            there = self._there()
        for name in there:
            if name not in good or name in _beyond(good, limit, keep):
                self.remove(name)


def _beyond(names: Sequence[str], limit: int, keep: Collection[str]) -> list[str]:
    """Returns the first names, but for some, whose going leaves no more than a number; fewer where too few may go."""
    return [name for name in names if name not in keep][: max(0, len(names) - limit)]


def step_of(name: str) -> int | None:
    """Returns the step that a checkpoint's name tells; None of another name."""
    number = name.removeprefix(PREFIX)
    return int(number) if name.startswith(PREFIX) and number.isdecimal() else None


def _counts(path: Path) -> bool:
    return path.is_file() and not path.name.startswith(RECORD)


def _described(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if size <= DIGESTED_BYTES else None
    return {"bytes": size, "sha256": digest}


def _recorded(path: Path) -> Mapping[str, Any] | None:
    return _parsed(path.read_bytes()) if path.is_file() else None


def _parsed(record: bytes) -> Mapping[str, Any] | None:
    """Returns the files of a record; None if it is none."""
    try:
        files = json.loads(record)["files"]
    except (ValueError, KeyError, TypeError):
        return None
    if not isinstance(files, dict) or not all(isinstance(described, dict) for described in files.values()):
        return None
    return files
