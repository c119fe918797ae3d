"""Copies of checkpoints at a URL."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from fsspec.implementations.local import LocalFileSystem

from logitstore.errors import LogitStoreError, StorageError, StorageRefusedError
from logitstore.storage.failures import is_refusal
from logitstore.storage.filesystems import open_fs
from logitstore.storage.options import Url
from trainer.loop.checkpoints import RECORD, beyond, defect, parsed, recorded, remove, step_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path


class DamagedCheckpointError(StorageError):
    """The files of a fetched checkpoint do not match its record."""


class Remote:
    """Copies of a run's finished checkpoints and other files at an fsspec URL.

    All methods raise StorageError if the URL cannot be reached, and StorageRefusedError if the storage refuses access.
    """

    def __init__(self, url: str, storage_options: dict[str, Any] | None = None) -> None:
        """Opens the URL. No request is sent yet.

        Args:
            url: URL of the run's folder.
            storage_options: Options of the URL's file system, such as credentials.

        Raises:
            MissingDriverError: No installed package can open URLs of this protocol.
        """
        self.url = str(Url(url))
        self._fs, root = open_fs(Url(url), storage_options)
        self._root = root.rstrip("/")

    def upload(self, folder: Path) -> None:
        """Copies a finished checkpoint to the URL. The record is copied last: a copy without it is unfinished."""
        # An earlier copy is deleted first, so that the old record is never in the same folder as new files.
        self.remove(folder.name)
        self.put({f"{folder.name}/{name}": folder / name for name in recorded(folder / RECORD) or {}})
        self.put({f"{folder.name}/{RECORD}": folder / RECORD})

    def put(self, files: Mapping[str, Path]) -> None:
        """Copies local files to the URL, in any order, and overwrites existing files.

        Args:
            files: Local paths, keyed by the name that each file gets below the URL.
        """
        targets = {f"{self._root}/{name}": str(path) for name, path in files.items()}
        with self._reached():
            # Other file systems create folders themselves, and makedirs on S3 would create a bucket.
            if isinstance(self._fs, LocalFileSystem):
                for parent in {target.rpartition("/")[0] for target in targets}:
                    self._fs.makedirs(parent, exist_ok=True)
            self._fs.put(list(targets.values()), list(targets))

    def finished(self) -> list[str]:
        """Returns the names of the finished checkpoints, in the order of their steps."""
        with self._reached():
            return [name for name in self._names() if self._is_finished(name)]

    @contextlib.contextmanager
    def _reached(self) -> Iterator[None]:
        """Context manager that turns exceptions of file system drivers into StorageError or StorageRefusedError."""
        try:
            yield
        except LogitStoreError:
            raise
        except Exception as error:  # Each driver raises the exceptions of its own service library.
            kind = StorageRefusedError if is_refusal(error) else StorageError
            raise kind(
                f"url must be readable and writable, got url={self.url} ({type(error).__name__}: "
                f"{' '.join(str(error).split()):.300}); check the bucket, the credentials and --storage_options"
            ) from error

    def _names(self) -> list[str]:
        """Returns the names of all checkpoints, finished or not, in the order of their steps."""
        # fsspec caches listings, and a cached listing may miss recent changes.
        self._fs.invalidate_cache()
        if not self._fs.exists(self._root):
            return []
        names = {path.rstrip("/").rpartition("/")[2] for path in self._fs.ls(self._root, detail=False)}
        return sorted((name for name in names if step_of(name) is not None), key=lambda name: step_of(name) or 0)

    def _is_finished(self, name: str) -> bool:
        # Digests are not compared here, because that would download every file; `fetch` compares them.
        folder = f"{self._root}/{name}"
        sizes = {path: info["size"] for path, info in self._fs.find(folder, detail=True).items()}
        sizes = {path.rpartition(f"/{name}/")[2]: size for path, size in sizes.items()}
        if RECORD not in sizes:
            return False
        files = parsed(self._fs.cat_file(f"{folder}/{RECORD}"))
        return files is not None and all(sizes.get(path) == info.get("bytes") for path, info in files.items())

    def fetch(self, name: str, folder: Path) -> Path:
        """Copies a finished checkpoint from the URL into the run's local folder.

        Args:
            name: Name of the checkpoint.
            folder: Local folder of the run.

        Returns:
            The local folder of the checkpoint.

        Raises:
            DamagedCheckpointError: The fetched files do not match the record.
        """
        local, partial = folder / name, folder / f"{name}.partial"
        # The copy gets a checkpoint's name only when it is complete, so that an interrupted copy is not used.
        for stale in (local, partial):
            remove(stale)
        source = f"{self._root}/{name}"
        with self._reached():
            files = parsed(self._fs.cat_file(f"{source}/{RECORD}")) or {}
        for path in (RECORD, *files):
            (partial / path).parent.mkdir(parents=True, exist_ok=True)
        with self._reached():
            self._fs.get([f"{source}/{path}" for path in files], [str(partial / path) for path in files])
            self._fs.get_file(f"{source}/{RECORD}", str(partial / RECORD))
        if reason := defect(partial):
            raise DamagedCheckpointError(
                f"checkpoint {self.url}/{name} is damaged: {reason}; resume from another checkpoint"
            )
        partial.replace(local)
        return local

    def remove(self, name: str) -> None:
        """Deletes a file or a checkpoint at the URL. Does nothing if the URL holds no such file or checkpoint."""
        folder = f"{self._root}/{name}"
        # A checkpoint's record is deleted first, so that an interrupted deletion leaves an unfinished checkpoint.
        with self._reached():
            self._fs.invalidate_cache()
            if not self._fs.exists(folder):
                return
            if self._fs.exists(f"{folder}/{RECORD}"):
                self._fs.rm_file(f"{folder}/{RECORD}")
            if self._fs.exists(folder):  # A bucket has no folders: if the record was the only file, nothing is left.
                self._fs.rm(folder, recursive=True)

    def rotate(self, limit: int | None, keep: Collection[str]) -> None:
        """Deletes all unfinished checkpoints, and the oldest finished ones until `limit` remain.

        Does nothing if there is no limit.

        Args:
            limit: Maximum number of finished checkpoints that remain. None or a number below 1 stands for no limit.
            keep: Names of finished checkpoints that are never deleted. They count towards `limit`.
        """
        if limit is None or limit <= 0:
            return
        good = self.finished()
        with self._reached():
            found = self._names()
        for name in found:
            if name not in good or name in beyond(good, limit, keep):
                self.remove(name)
