"""Where a store's bytes lie: a local folder or any fsspec URL. Nothing here knows what a store holds.

Every object is written whole or not at all, and read with a bound: on a local disk by local_files.py, elsewhere by one
PUT.
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fsspec.implementations.local import LocalFileSystem

from logitstore.errors import FormatError, StorageError, StorageRefusedError
from logitstore.format.strict_json import FROM_A_COPY, parse_json
from logitstore.storage import local_disk
from logitstore.storage.failures import is_refusal, may_pass
from logitstore.storage.filesystems import fetch, listed, open_fs, sizes
from logitstore.storage.options import without_credentials

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from logitstore.storage.cache import ReadThroughCache

T = TypeVar("T")
U = TypeVar("U")

PATIENCE_S = 60.0
"""How long a bucket that fails is tried again, once it has answered."""
FIRST_PATIENCE_S = 15.0
"""How long before that: an address that is wrong must show soon."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.1, 10.0
"""Waits between tries: each twice the one before, drawn between half and all of it."""
COPIES_AT_ONCE = frozenset({"s3", "gs", "memory"})
"""File systems whose copy is there once they say so. Azure may make it later, from what is at the source then."""
REQUESTS_AT_ONCE = 8
"""Objects written at once to a bucket by one process."""
MAX_JSON_BYTES = 2**22
"""No metadata of a store is longer."""


class Storage:
    """One root folder, local or remote, and the few things a store does with it.

    What is missing raises FileNotFoundError. Everything else that goes wrong becomes a StorageError after some tries,
    or a StorageRefusedError at once where trying again cannot help. Paths are relative to the root.

    Attributes:
        url: The root as given, without credentials.
        root: Its path in the file system.
        is_local: Whether it is a folder of this machine.
        cache: Keeps objects read from a bucket on the local disk; None for none.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        storage_options: dict[str, Any] | None = None,
        cache: tuple[str, int] | None = None,
    ) -> None:
        """Opens the file system; does not touch that of a bucket.

        Args:
            url: A folder or any fsspec URL.
            storage_options: What its file system needs. Never stored, never printed.
            cache: Folder and size in bytes of a local cache for a bucket's objects; no use for a local folder.

        Raises:
            ValueError: The URL is blank, which to fsspec is the folder of this process, or of a file.
            MissingDriverError: No installed package opens this protocol.
        """
        raw = os.fspath(url)
        if not raw.rpartition("://")[2].strip():
            raise ValueError(f"url must be a folder or a URL, got url={raw!r}; for this folder give .")
        self._raw_url = raw
        self.url = without_credentials(raw).rstrip("/")
        self._fs, path = open_fs(raw, storage_options, tries_again=False)
        # With what fsspec itself is configured with on this machine: other processes may run on others.
        self._options = dict(self._fs.storage_options)
        self.root = path.rstrip("/")
        self.is_local = isinstance(self._fs, LocalFileSystem)
        if self.is_local:
            self._raw_url = path  # a process that this goes to may run in another folder
            if os.path.exists(path) and not os.path.isdir(path):
                raise ValueError(f"url must be a folder or a URL, got url={self.url}, which is a file; give another")
        self._has_answered = False
        self.cache: ReadThroughCache | None = None
        if cache is not None and not self.is_local:
            from logitstore.storage.cache import ReadThroughCache

            self.cache = ReadThroughCache(self._fs, cache[0], max_bytes=cache[1])

    def __reduce__(self) -> tuple[type[Storage], tuple[Any, ...], dict[str, Any]]:
        state = {"cache": self.cache, "_has_answered": self._has_answered}
        return Storage, (self._raw_url, self._options), state

    def without_cache(self) -> Storage:
        """Returns the same, but reading from the bucket alone."""
        return Storage(self._raw_url, self._options)

    # Reading

    def names(self, path: str) -> list[str]:
        """Lists the names in a folder, sorted; empty where there is no such folder."""
        folder = f"{self.root}/{path}"

        def names() -> list[str]:
            try:
                # fsspec takes six times as long for a folder of this machine.
                found = os.listdir(folder) if self.is_local else listed(self._fs, folder)
            except (FileNotFoundError, NotADirectoryError):
                return []
            return sorted(name for name in found if not name.endswith(local_disk.PARTIAL))

        return self._try(names, path)

    def names_with(self, path: str, prefix: str) -> list[str]:
        """Lists the names in a folder that begin with a prefix, in one request where the service can.

        For who is about to write by what it says: no network file system answers from memory.
        """
        if self.is_local:
            self._try(lambda: local_disk.refresh(self._inside(f"{path}/any").parent), path)
            return [name for name in self.names(path) if name.startswith(prefix)]
        folder = f"{self.root}/{path}"

        def found() -> list[str]:
            self._fs.invalidate_cache(folder)
            try:
                entries = self._fs.find(folder, prefix=prefix)
            except FileNotFoundError:
                return []
            return sorted(str(entry).rsplit("/", 1)[1] for entry in entries)

        return [name for name in self._try(found, path) if name.startswith(prefix)]

    def get(self, path: str, limit: int = MAX_JSON_BYTES) -> bytes:
        """Reads one object, of at most `limit` bytes.

        Raises:
            FileNotFoundError: There is none.
            FormatError: It is longer.
        """
        (data,) = self.get_many([path], [limit])
        if data is None:
            raise FileNotFoundError(f"{self.url}/{path}")
        if len(data) > limit:
            raise FormatError(f"{path} must be of at most {limit} bytes, got more; this is no store of this format")
        return data

    def get_many(self, paths: Sequence[str], limits: Sequence[int], *, cached: bool = False) -> list[bytes | None]:
        """Reads objects, concurrently where the file system can.

        Args:
            paths: Which.
            limits: No more than this many bytes and one are read of each: a longer object shows by its length.
            cached: Whether the local cache may answer. For objects whose content is known by checksum only.

        Returns:
            Their bytes, None for those that are not there.
        """
        full = [f"{self.root}/{path}" for path in paths]
        data: list[bytes | None] = [None] * len(paths)
        waiting = list(range(len(paths)))

        def read() -> None:
            answers = self._read([full[i] for i in waiting], [limits[i] for i in waiting], cached=cached)
            failures = []
            for i, answer in zip(list(waiting), answers, strict=True):
                if isinstance(answer, bytes):
                    data[i] = answer
                elif not isinstance(answer, FileNotFoundError):
                    failures.append((i, answer))
                    continue
                waiting.remove(i)
            if failures:
                raise failures[0][1]

        self._try(read, paths[0] if paths else "")
        return data

    def _read(self, full: list[str], limits: list[int], *, cached: bool) -> list[bytes | Exception]:
        if self.is_local:
            return [local_disk.read(path, limit + 1) for path, limit in zip(full, limits, strict=True)]
        if cached and self.cache is not None:
            return self.cache.read(full, limits)
        return fetch(self._fs, full, limits)

    def get_json(self, path: str, way_out: str = FROM_A_COPY) -> Any:  # noqa: ANN401
        """Reads one small JSON file.

        Raises:
            FileNotFoundError: There is none.
            FormatError: It holds no JSON; the message ends with the way out.
        """
        return parse_json(path, self.get(path), way_out)

    def num_bytes(self, path: str) -> int:
        """Adds up the sizes of all objects below a folder."""
        folder = f"{self.root}/{path}"
        if self.is_local:
            return self._try(lambda: local_disk.num_bytes(folder), path)
        return sum(self._try(lambda: sizes(self._fs, folder), path).values())

    # Writing

    def put(self, path: str, data: bytes) -> None:
        """Writes an object whole or not at all, in the place of what was there."""
        if self.is_local:
            self._make_root()
            self._try(lambda: local_disk.put(self._inside(path), data), path)
        else:
            with self._there_to_write(path):
                self._try(lambda: self._fs.pipe_file(f"{self.root}/{path}", data), path)

    def create(self, path: str, data: bytes) -> bool:
        """Writes an object whole, but only where there is none; of several that try at once one succeeds.

        Returns:
            Whether it was written. A False may also be the echo of this very call's first try, whose answer got lost:
            callers read back whose it is.
        """
        if self.is_local:
            self._make_root()
            return self._try(lambda: local_disk.create(self._inside(path), data), path)

        def created() -> bool:
            try:
                self._fs.pipe_file(f"{self.root}/{path}", data, mode="create")
            except FileExistsError:
                return False
            return True

        with self._there_to_write(path):
            return self._try(created, path)

    def copy(self, source: str, path: str) -> None:
        """Copies an object within the store, whole or not at all, in the place of what was there.

        Raises:
            FileNotFoundError: The source is not there.
        """
        if self.is_local:
            self._try(lambda: local_disk.copy(self._inside(source), self._inside(path)), path)
            return
        full = (f"{self.root}/{source}", f"{self.root}/{path}")
        self._try(lambda: self._fs.cp_file(*full), path)
        if COPIES_AT_ONCE.isdisjoint([self._fs.protocol] if isinstance(self._fs.protocol, str) else self._fs.protocol):
            self._try(lambda: self._check_copied(*full), path)

    def _check_copied(self, source: str, copy: str) -> None:
        size = self._fs.info(source)["size"]
        wanted, found = fetch(self._fs, [source, copy], [size, size])
        if isinstance(wanted, Exception):
            raise wanted
        if found != wanted:
            raise TimeoutError("the service has not finished its copy")

    def remove(self, path: str) -> None:
        """Deletes an object, if it is there; on a local disk also a folder in its place."""
        if self.is_local:
            self._try(lambda: local_disk.remove(self._inside(path)), path)
            return

        def removed() -> None:
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(f"{self.root}/{path}")

        self._try(removed, path)

    def remove_folder(self, path: str) -> None:
        """Deletes a folder of a local disk and all in it, if it is there; a bucket has no folders."""
        if self.is_local:
            self._try(lambda: local_disk.remove_folder(str(self._inside(path))), path)

    def remove_partials(self, path: str) -> int:
        """Deletes what writers killed a day ago or more left in a folder. Returns how many files.

        Only on a local disk do they leave anything. What they staged is not meant: publish.clean removes it.
        """
        if not self.is_local:
            return 0
        return self._try(lambda: local_disk.remove_partials(self._inside(os.path.join(path, "any")).parent), path)

    def _inside(self, path: str) -> Path:
        """Returns where a local object is to change, unless a link that somebody put into the store leads elsewhere."""
        full = Path(f"{self.root}/{path}")
        if not full.parent.resolve().is_relative_to(Path(f"{self.root}/").resolve()):
            raise PermissionError(f"{full} leads out of the store by a symbolic link; put the folder itself there")
        return full

    def _make_root(self) -> None:
        """Makes the store's folder on a local disk for the first that is written."""
        if os.path.isdir(f"{self.root}/"):
            return
        try:
            local_disk.make_folder(Path(self.root))
        except OSError as error:
            kind = StorageRefusedError if is_refusal(error) else ValueError
            raise kind(
                f"url must be a folder that can be made, got url={self.url} ({error.strerror}: {error.filename}); "
                "give another"
            ) from error

    def for_each(self, action: Callable[[U], T], items: Iterable[U]) -> list[T]:
        """Does something for each of a few objects, several at once in a bucket."""
        if self.is_local:
            return [action(item) for item in items]
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            return list(pool.map(action, items))

    @contextlib.contextmanager
    def _there_to_write(self, path: str) -> Iterator[None]:
        """What a bucket that is not there looks like to a writer."""
        try:
            yield
        except FileNotFoundError as error:
            raise StorageRefusedError(
                f"url must be one that can be written, got url={self.url} at {path} (FileNotFoundError: {error}); "
                "check the bucket, the credentials and --storage_options"
            ) from error

    def _try(self, operation: Callable[[], T], path: str) -> T:
        """Does something, again after a while where that may help."""
        started, wait = time.monotonic(), FIRST_WAIT_S
        while True:
            try:
                result = operation()
            except (FileNotFoundError, FormatError):
                self._has_answered = True
                raise
            except Exception as error:  # drivers raise whatever their services' libraries do
                said = f"url={self.url} at {path or '/'} ({type(error).__name__}: {' '.join(str(error).split()):.300})"
                if is_refusal(error):
                    raise StorageRefusedError(
                        f"url must be one that may be read or written and has space, got {said}; check the disk, the "
                        "bucket, the credentials and --storage_options, then run the same command again"
                    ) from error
                patience = PATIENCE_S if self._has_answered else FIRST_PATIENCE_S
                if self.is_local or not may_pass(error) or time.monotonic() + wait > started + patience:
                    raise StorageError(
                        f"url must be one that can be reached, got {said}; check the bucket, the credentials and "
                        "--storage_options, then run the same command again"
                    ) from error
            else:
                self._has_answered = True
                return result
            time.sleep(wait * random.uniform(0.5, 1.0))
            wait = min(2 * wait, LONGEST_WAIT_S)
