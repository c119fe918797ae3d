"""Keeps objects of a bucket on the local disk, in a folder of bounded size that any number of processes may share.

Use this cache only for objects that the caller checks with a checksum. A cached object is never compared with the
bucket again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fsspec.implementations.cache_mapper import HashCacheMapper

from logitstore.storage.filesystems import fetch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

logger = logging.getLogger(__name__)

OWN_FILE = re.compile(r"[0-9a-f]{64}(\.[0-9a-f]{32}\.partial)?")
"""Pattern of the names that a cache gives to its files. Other files in the folder are neither counted nor removed."""
SERVICE_OPTIONS = ("endpoint_url", "account_name", "host", "port")
"""File system options that determine which service holds a bucket, if the URL does not determine it."""
FILES_PER_LOOK = 1000
"""Before a process scans the folder again, it may add one file for every FILES_PER_LOOK files in the folder. If the
folder has 5,000 files, for example, 5 files may be added, and the sixth causes a scan. A scan takes about 6 us per
file, so not every new file should cause one."""


class ReadThroughCache:
    """Reads whole objects from a folder of this machine. Objects that the folder lacks come from the bucket.

    The cache names files by fsspec's `HashCacheMapper` in one flat folder, and downloads through the file system's own
    concurrent `cat_ranges`. fsspec's cache `simplecache` (as of fsspec 2026.9) does not suit several processes and a
    bounded size:

    - `simplecache` downloads to the final name and treats every file of that name as complete. So a second process may
      read half an object, and a download that fails or is killed leaves half an object there permanently.
    - `simplecache` has no limit on the size: files are removed only by age, and `pop_from_cache` removes nothing.
    - `simplecache` downloads objects of any length whole. One missing object fails the whole request.
    - `simplecache` hashes only the path, so buckets of the same name on two services share their files.

    This cache renames a file to its final name once the file is whole, so no process ever sees half a file. A process
    can read a file to its end even if the file is evicted meanwhile. Nothing is synced, so a power cut can leave a
    short file. The caller's checksum detects a short file, like any other damage, and `drop` removes the file.

    **Eviction.** Files that were last used before this cache was opened are evicted, least recently used first. The
    modification time of a file records its last use. Files that were used after the cache was opened are kept. If the
    folder is full of such files, no more files are added. With this rule, a cache that holds a quarter of a store
    serves 25% of the reads of an epoch in random order. A cache that evicts the least recently used file for each new
    one would serve 3%: it would evict files that this epoch has not read yet, and keep files that are read again only
    in the next epoch.

    **Bound.** The folder may exceed `max_bytes` for a moment. The excess consists of the files that the processes have
    just added. In a folder of 1,000 files or more, each process may add one file per 1,000 files before it scans the
    folder again. If the folder cannot be written or the disk is full, the cache logs one warning and adds no more
    files.

    Attributes:
        folder: Absolute path of the folder that holds the files.
        max_bytes: Maximum total size of the files, in bytes.
    """

    def __init__(
        self,
        fs: Any,  # noqa: ANN401
        folder: str | os.PathLike[str],
        max_bytes: int,
        opened_ns: int | None = None,
    ) -> None:
        """Sets up the cache without accessing the folder or the bucket.

        Args:
            fs: The bucket's fsspec file system.
            folder: Folder for the files, created when the first file is added. Stores, jobs and processes may share it.
            max_bytes: Maximum total size of the files in bytes, above 0.
            opened_ns: Time at which the cache was opened, in nanoseconds as returned by time.time_ns(). Files that were
                last used before this time may be evicted. If None, the current time is used.

        Raises:
            ValueError: `max_bytes` is not positive.
        """
        if max_bytes <= 0:
            raise ValueError(
                f"max_bytes must be positive, got max_bytes={max_bytes}; "
                "give the bytes that the local cache may take, or omit the cache folder to use no cache"
            )
        self._fs = fs
        # Absolute, because a process that unpickles this cache may have another working directory.
        self.folder = Path(folder).expanduser().absolute()
        self.max_bytes = max_bytes
        options = {**fs.storage_options, **(fs.storage_options.get("client_kwargs") or {})}
        self._service = " ".join(str(options.get(name, "")) for name in SERVICE_OPTIONS)
        self._mapper = HashCacheMapper()
        self._opened_ns = time.time_ns() if opened_ns is None else opened_ns
        self._is_adding = True
        self._num_files = 0
        # Paths of the files that were added since the last scan of the folder.
        self._added: list[str] = []

    def __reduce__(self) -> tuple[type[ReadThroughCache], tuple[Any, ...]]:
        # All workers of a run share one opening time, so that no worker evicts files that another worker has used.
        return ReadThroughCache, (self._fs, self.folder, self.max_bytes, self._opened_ns)

    def read(self, paths: Sequence[str], limits: Sequence[int]) -> list[bytes | Exception]:
        """Reads objects from the folder. Objects that the folder lacks are read from the bucket, concurrently.

        Args:
            paths: Paths of the objects in the file system.
            limits: Maximum expected size of each object in bytes. At most one more byte is read, so a larger object is
                recognised by its length. Larger objects are not cached.

        Returns:
            For each path, the bytes of the object, or the exception that the file system raised. The exception is a
            FileNotFoundError if the object does not exist.
        """
        answers: list[bytes | Exception | None] = [
            self._cached(path, limit) for path, limit in zip(paths, limits, strict=True)
        ]
        missing = [i for i, answer in enumerate(answers) if answer is None]
        fetched = fetch(self._fs, [paths[i] for i in missing], [limits[i] for i in missing]) if missing else []
        for i, answer in zip(missing, fetched, strict=True):
            answers[i] = answer
            if self._is_adding and isinstance(answer, bytes) and len(answer) <= min(limits[i], self.max_bytes):
                self._add(paths[i], answer)
        # A folder of fewer than 1,000 files is scanned after each read that added a file.
        if len(self._added) * FILES_PER_LOOK > self._num_files:
            self._make_room()
        return [answer for answer in answers if answer is not None]

    def drop(self, paths: Sequence[str]) -> None:
        """Removes objects from the folder. Call this method for objects that did not match their checksums.

        Args:
            paths: Paths of the objects in the file system.
        """
        for path in paths:
            # The file may not exist, or this user may not be allowed to remove it. The error is ignored, because every
            # other reader of the file finds the damage by the checksum too.
            with contextlib.suppress(OSError):
                self._file(path).unlink()

    def _file(self, path: str) -> Path:
        """Returns the path of the cached file of an object."""
        name: str = self._mapper(f"{self._service} {self._fs.unstrip_protocol(path)}")
        return self.folder / name

    def _cached(self, path: str, limit: int) -> bytes | None:
        """Returns at most `limit` + 1 bytes of an object and marks its file as just used; None if it is not cached."""
        file = self._file(path)
        try:
            with file.open("rb") as opened:
                data = opened.read(limit + 1)
        except OSError:  # Not cached, or on a failing disk: the object is then read from the bucket.
            return None
        with contextlib.suppress(OSError):  # The file was evicted just now, or this user may only read the folder.
            _touch(file)
        return data

    def _add(self, path: str, data: bytes) -> None:
        """Adds an object to the folder. After an error, the cache adds no more files."""
        file = self._file(path)
        partial = file.with_name(f"{file.name}.{uuid.uuid4().hex}.partial")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with partial.open("xb") as opened:
                opened.write(data)
            # A process that opened its cache later may have evicted the partial file.
            with contextlib.suppress(FileNotFoundError):
                _touch(partial)
                partial.replace(file)
                self._added.append(str(file))
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            self._stop_adding(error)

    def _make_room(self) -> None:
        """Brings the folder back within its bound: evicts old files, then files that this process has just added."""
        times: dict[str, int] = {}
        sizes: dict[str, int] = {}
        try:
            with os.scandir(self.folder) as entries:
                for entry in entries:
                    if OWN_FILE.fullmatch(entry.name):
                        with contextlib.suppress(FileNotFoundError):
                            status = entry.stat(follow_symlinks=False)
                            times[entry.path], sizes[entry.path] = status.st_mtime_ns, status.st_size
            excess = sum(sizes.values()) - self.max_bytes
            # Partial files of killed writers are counted and evicted like the other files.
            old = sorted((path for path, used in times.items() if used < self._opened_ns), key=times.__getitem__)
            excess = _remove(old, sizes, excess)
            if excess > 0:
                logger.debug(
                    "cache folder %s is full of files that were used since it was opened: no more files are added",
                    self.folder,
                )
                self._is_adding = False
                _remove([path for path in reversed(self._added) if path in sizes], sizes, excess)
        except FileNotFoundError:  # The folder was removed, so it holds nothing.
            pass
        except OSError as error:
            self._stop_adding(error)
        self._num_files = len(sizes)
        self._added.clear()

    def _stop_adding(self, error: OSError) -> None:
        """Stops adding files, and logs one warning with the reason."""
        if self._is_adding:
            logger.warning(
                "cannot use the cache folder %s (%s); no more files are added, and objects that it lacks are read from "
                "the bucket each time; check its permissions and the free space",
                self.folder,
                error,
            )
        self._is_adding = False


def _remove(paths: Iterable[str], sizes: dict[str, int], excess: int) -> int:
    """Removes files in order until `excess` bytes are freed. Returns the number of bytes that are still in excess."""
    for path in paths:
        if excess <= 0:
            break
        with contextlib.suppress(FileNotFoundError):  # Another process has removed it for the same reason.
            os.unlink(path)
        excess -= sizes[path]
    return excess


def _touch(file: Path) -> None:
    """Sets the times of a file to now."""
    now = time.time_ns()  # Passed explicitly, because the kernel's own time has steps of milliseconds.
    os.utime(file, ns=(now, now))
