"""Checkpoints at a URL."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from fsspec.implementations.local import LocalFileSystem

from logitstore.errors import LogitStoreError, StorageError, StorageRefusedError
from logitstore.storage.failures import is_refusal
from logitstore.storage.filesystems import open_fs
from logitstore.storage.options import without_credentials
from trainer.loop.checkpoints import RECORD, beyond, defect, parsed, recorded, remove, step_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path


class DamagedCheckpointError(StorageError):
    """What came of a checkpoint is not what its record says."""


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
        self.put({f"{folder.name}/{name}": folder / name for name in recorded(folder / RECORD) or {}})
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
        files = parsed(self._fs.cat_file(f"{folder}/{RECORD}"))
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
            files = parsed(self._fs.cat_file(f"{source}/{RECORD}")) or {}
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
            if name not in good or name in beyond(good, limit, keep):
                self.remove(name)
