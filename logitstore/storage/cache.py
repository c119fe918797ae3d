"""Objects of a bucket kept on the local disk, in a folder of bounded size that any number of processes share.

Only for objects whose content is known by a checksum: a cached object is not compared with the bucket's again.
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
"""Names that a cache gives to its files. Others in the folder are somebody's own: neither counted nor removed."""
SERVICE_OPTIONS = ("endpoint_url", "account_name", "host", "port")
"""File system options that say whose bucket it is where the URL does not."""
FILES_PER_LOOK = 1000
"""Looking at a folder takes some 6 us for each file: one look for every thousandth part of it that is new."""


class ReadThroughCache:
    """Reads whole objects from a folder of this machine, and from the bucket what is not there yet.

    It names files as fsspec's `simplecache` does, by `HashCacheMapper` in one flat folder, and downloads through the
    file system's own concurrent `cat_ranges`. The rest of `simplecache` (looked at in fsspec 2026.9) does not fit
    several processes and a bound:

    - It downloads to the final name and takes every file of that name for complete: a second process gets half an
      object from it, and a download that fails or is killed leaves half an object there for good.
    - It knows no size: files are only removed by age, and `pop_from_cache` removes nothing.
    - It downloads objects of any length whole, and one that is missing fails all that were asked for with it.
    - It hashes the path alone, so that the same bucket name on two services is one.

    Here a file gets its final name by a rename once it is whole, so nothing that another process does shows half of
    it; one that is evicted while it is read stays readable to the end. A power cut can still leave a short file, as
    nothing is synced: the caller's checksum finds it, like any other damage, and `drop` forgets it.

    What was last used before this cache was opened makes room, oldest first, by modification time, which a hit renews.
    What was used since stays, and once nothing older is left, nothing more is added: an epoch in random order reads
    everything once, so that what was read longest ago is as likely to come next as anything else. Giving it up for
    the newest would leave 3% of hits where a quarter of a store fits, instead of 25%.

    The folder may exceed the bound for a moment: by what its processes have just added, and, where it holds 1,000
    files or more, by a thousandth of them for each process. A folder that cannot be written, or a full disk, is told
    once as a warning; then nothing more is added either.

    Attributes:
        folder: Where the files lie.
        max_bytes: The most that the files may take.
    """

    def __init__(
        self,
        fs: Any,  # noqa: ANN401
        folder: str | os.PathLike[str],
        max_bytes: int,
        opened_ns: int | None = None,
    ) -> None:
        """Touches neither the folder nor the bucket.

        Args:
            fs: The bucket's fsspec file system.
            folder: Created once something is added. May be shared by stores, jobs and processes.
            max_bytes: Above 0.
            opened_ns: What was last used before, in time.time_ns(), makes room; now by default.

        Raises:
            ValueError: `max_bytes` is not positive.
        """
        if max_bytes <= 0:
            raise ValueError(
                f"max_bytes must be positive, got max_bytes={max_bytes}; "
                "give the bytes that the local cache may take, or no folder for no cache"
            )
        self._fs = fs
        # Absolute: a process that this goes to may run in another folder.
        self.folder = Path(folder).expanduser().absolute()
        self.max_bytes = max_bytes
        options = {**fs.storage_options, **(fs.storage_options.get("client_kwargs") or {})}
        self._service = " ".join(str(options.get(name, "")) for name in SERVICE_OPTIONS)
        self._mapper = HashCacheMapper()
        self._opened_ns = time.time_ns() if opened_ns is None else opened_ns
        self._is_adding = True
        self._num_files = 0
        # Since the folder was last looked at.
        self._added: list[str] = []

    def __reduce__(self) -> tuple[type[ReadThroughCache], tuple[Any, ...]]:
        # The workers of one run are of one time.
        return ReadThroughCache, (self._fs, self.folder, self.max_bytes, self._opened_ns)

    def read(self, paths: Sequence[str], limits: Sequence[int]) -> list[bytes | Exception]:
        """Reads objects, those that are not in the folder all at once from the bucket.

        Args:
            paths: Which, as the file system names them.
            limits: As many as `paths`. No more than this many bytes and one of an object are read; one that is longer
                shows by its length, and is not kept.

        Returns:
            For each the bytes, or what the file system raised for it; FileNotFoundError if it is not there.
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
        # A folder of fewer than 1,000 files is looked at after each read that added some.
        if len(self._added) * FILES_PER_LOOK > self._num_files:
            self._make_room()
        return [answer for answer in answers if answer is not None]

    def drop(self, paths: Sequence[str]) -> None:
        """Forgets objects that turned out to have a wrong checksum."""
        for path in paths:
            with contextlib.suppress(OSError):  # not there, or not ours to remove: others find out for themselves
                self._file(path).unlink()

    def _file(self, path: str) -> Path:
        name: str = self._mapper(f"{self._service} {self._fs.unstrip_protocol(path)}")
        return self.folder / name

    def _cached(self, path: str, limit: int) -> bytes | None:
        file = self._file(path)
        try:
            with file.open("rb") as opened:
                data = opened.read(limit + 1)
        except OSError:  # not there, or on a failing disk: the bucket has it
            return None
        with contextlib.suppress(OSError):  # evicted just now, or a folder that this user may only read
            _touch(file)
        return data

    def _add(self, path: str, data: bytes) -> None:
        file = self._file(path)
        partial = file.with_name(f"{file.name}.{uuid.uuid4().hex}.partial")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with partial.open("xb") as opened:
                opened.write(data)
            with contextlib.suppress(FileNotFoundError):  # evicted by a process that was opened since
                _touch(partial)
                partial.replace(file)
                self._added.append(str(file))
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            self._stop_adding(error)

    def _make_room(self) -> None:
        """Brings the folder back within its bound: what is old goes, else what was just added."""
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
            # Files of killed writers age and go like others.
            old = sorted((path for path, used in times.items() if used < self._opened_ns), key=times.__getitem__)
            excess = _remove(old, sizes, excess)
            if excess > 0:
                logger.debug("cache folder %s is full of what was used since: nothing more is added", self.folder)
                self._is_adding = False
                _remove([path for path in reversed(self._added) if path in sizes], sizes, excess)
        except FileNotFoundError:  # somebody removed the folder
            pass
        except OSError as error:
            self._stop_adding(error)
        self._num_files = len(sizes)
        self._added.clear()

    def _stop_adding(self, error: OSError) -> None:
        if self._is_adding:
            logger.warning(
                "cache folder must be one that can be written and has space, got folder=%s (%s); "
                "what it does not hold is read from the bucket each time",
                self.folder,
                error,
            )
        self._is_adding = False


def _remove(paths: Iterable[str], sizes: dict[str, int], excess: int) -> int:
    """Removes files, one by one, until no bytes are too many any more; returns how many still are."""
    for path in paths:
        if excess <= 0:
            break
        with contextlib.suppress(FileNotFoundError):  # another process makes the same room
            os.unlink(path)
        excess -= sizes[path]
    return excess


def _touch(file: Path) -> None:
    now = time.time_ns()  # given: the time that the kernel would take has steps of milliseconds
    os.utime(file, ns=(now, now))
