"""Reads and writes objects below a root URL, which is a local folder or any fsspec URL.

This module does not depend on what the objects contain. Every object is written whole or not at all: on a local disk by
`local_disk`, in a bucket by one PUT. Every read has a limit on the size of the object.
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
from logitstore.storage.failures import cause, is_refusal, may_pass
from logitstore.storage.filesystems import fetch, listed, open_fs, sizes
from logitstore.storage.options import Url

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from logitstore.storage.cache import ReadThroughCache

T = TypeVar("T")
U = TypeVar("U")

PATIENCE_S = 60.0
"""Time in seconds for which a failing request is retried, if the bucket has answered an earlier request."""
FIRST_PATIENCE_S = 15.0
"""Time in seconds for which a failing request is retried, if the bucket has never answered. This time is shorter
than PATIENCE_S, so that a wrong address is reported soon."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.1, 10.0
"""First and longest wait between tries, in seconds. Each wait is twice as long as the wait before it, and is then
multiplied by a random factor from 0.5 to 1."""
COPIES_AT_ONCE = frozenset({"s3", "gs", "memory"})
"""Protocols of services that finish a copy before the call returns. Azure may finish a copy after the call returns, and
the source may have changed by then."""
REQUESTS_AT_ONCE = 8
"""Maximum number of requests that one call of `for_each` sends to a bucket at the same time."""
MAX_JSON_BYTES = 2**22
"""Maximum size of a store's metadata objects, in bytes."""


class Storage:
    """The objects below a root folder, local or in a bucket. Paths are relative to the root.

    Methods that need an existing object raise FileNotFoundError if it is missing. Any other failure raises a
    StorageError, after some retries if a retry may help. If the disk or the service refuses a request, for example
    because a permission is missing, a StorageRefusedError is raised at once.

    Attributes:
        url: The root as given, without credentials.
        root: Path of the root in its file system.
        is_local: Whether the root is a folder of this machine.
        cache: Local cache of objects read from a bucket; None without a cache.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        storage_options: dict[str, Any] | None = None,
        cache: tuple[str, int] | None = None,
    ) -> None:
        """Opens the file system. Sends no request to a bucket.

        Args:
            url: A folder or any fsspec URL.
            storage_options: Options of the file system, such as credentials. They are never stored or printed.
            cache: Folder and size in bytes of a local cache for a bucket's objects; ignored for a local folder.

        Raises:
            ValueError: The URL is blank (fsspec would use the working directory), or it is the path of a file.
            MissingDriverError: No installed package opens this protocol.
        """
        raw = os.fspath(url)
        if not raw.rpartition("://")[2].strip():
            raise ValueError(f"url must be a folder or a URL, got url={raw!r}; give '.' for the current folder")
        self._url = Url(raw)
        self.url = str(self._url).rstrip("/")
        self._fs, path = open_fs(self._url, storage_options, tries_again=False)
        # The options include this machine's fsspec configuration, because other processes may run on other machines.
        self._options = dict(self._fs.storage_options)
        self.root = path.rstrip("/")
        self.is_local = isinstance(self._fs, LocalFileSystem)
        if self.is_local:
            self._url = Url(path)  # absolute, because a process that unpickles this may run in another folder
            if os.path.exists(path) and not os.path.isdir(path):
                raise ValueError(f"url must be a folder or a URL, got url={self.url}, which is a file; give a folder")
        self._has_answered = False
        self.cache: ReadThroughCache | None = None
        if cache is not None and not self.is_local:
            from logitstore.storage.cache import ReadThroughCache

            self.cache = ReadThroughCache(self._fs, cache[0], max_bytes=cache[1])

    def __reduce__(self) -> tuple[type[Storage], tuple[Any, ...], dict[str, Any]]:
        # The other process needs the credentials too, so it gets the raw URL and the options.
        state = {"cache": self.cache, "_has_answered": self._has_answered}
        return Storage, (self._url.raw, self._options), state

    def without_cache(self) -> Storage:
        """Returns the same storage without its local cache."""
        return Storage(self._url.raw, self._options)

    # Reading

    def names(self, path: str) -> list[str]:
        """Lists the names in a folder in sorted order. Returns an empty list if the folder does not exist."""
        folder = f"{self.root}/{path}"

        def names() -> list[str]:
            try:
                # os.listdir, because fsspec takes six times as long for a local folder.
                found = os.listdir(folder) if self.is_local else listed(self._fs, folder)
            except (FileNotFoundError, NotADirectoryError):
                return []
            # Partial files of running or killed writers are not objects of the store.
            return sorted(name for name in found if not name.endswith(local_disk.PARTIAL))

        return self._try(names, path)

    def names_with(self, path: str, prefix: str) -> list[str]:
        """Lists the names in a folder that begin with a prefix, in one request if the service supports it.

        Bypasses every cache of listings. Before a write that depends on the listing, call this method instead of
        `names`.
        """
        if self.is_local:
            # `_inside` checks the folder that contains a path. To check the folder `path` itself, a name is appended.
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
        """Reads one object of at most `limit` bytes.

        Raises:
            FileNotFoundError: The object does not exist.
            FormatError: The object is longer than `limit`.
        """
        (data,) = self.get_many([path], [limit])
        if data is None:
            raise FileNotFoundError(f"{self.url}/{path}")
        if len(data) > limit:
            raise FormatError(f"{path} must have at most {limit} bytes, got more; this is not a logitstore store")
        return data

    def get_many(self, paths: Sequence[str], limits: Sequence[int], *, cached: bool = False) -> list[bytes | None]:
        """Reads objects, concurrently if the file system supports it.

        Args:
            paths: Paths of the objects.
            limits: Maximum size of each object in bytes. One more byte is read, so the caller can recognise a longer
                object.
            cached: Whether objects may come from the local cache. Set this to True only for objects that the caller
                checks with a checksum.

        Returns:
            The bytes of each object; None for objects that do not exist.
        """
        full = [f"{self.root}/{path}" for path in paths]
        data: list[bytes | None] = [None] * len(paths)
        waiting = list(range(len(paths)))

        # A retry requests only the objects that have not been read yet.
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
            FileNotFoundError: The file does not exist.
            FormatError: The file does not hold JSON; the message ends with `way_out`.
        """
        return parse_json(path, self.get(path), way_out)

    def num_bytes(self, path: str) -> int:
        """Returns the total size of all objects below a folder, in bytes."""
        folder = f"{self.root}/{path}"
        if self.is_local:
            return self._try(lambda: local_disk.num_bytes(folder), path)
        return sum(self._try(lambda: sizes(self._fs, folder), path).values())

    # Writing

    def put(self, path: str, data: bytes) -> None:
        """Writes an object whole or not at all. Replaces an existing object."""
        if self.is_local:
            self._make_root()
            self._try(lambda: local_disk.put(self._inside(path), data), path)
        else:
            with self._there_to_write(path):
                self._try(lambda: self._fs.pipe_file(f"{self.root}/{path}", data), path)

    def create(self, path: str, data: bytes) -> bool:
        """Writes an object, whole or not at all. Writes nothing if an object already has this path.

        Of several callers at the same time, at most one succeeds.

        Returns:
            Whether the object was written. False does not prove that another caller wrote the object: if the service's
            answer to the first try was lost, the retry finds the object that the first try wrote. To know who wrote the
            object, read it.
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
        """Copies an object, whole or not at all. Replaces an existing object.

        Raises:
            FileNotFoundError: The source does not exist.
        """
        if self.is_local:
            self._try(lambda: local_disk.copy(self._inside(source), self._inside(path)), path)
            return
        full = (f"{self.root}/{source}", f"{self.root}/{path}")
        self._try(lambda: self._fs.cp_file(*full), path)
        # A service that is not in COPIES_AT_ONCE may finish a copy later, so the copy is compared with its source.
        if COPIES_AT_ONCE.isdisjoint([self._fs.protocol] if isinstance(self._fs.protocol, str) else self._fs.protocol):
            self._try(lambda: self._check_copied(*full), path)

    def _check_copied(self, source: str, copy: str) -> None:
        size = self._fs.info(source)["size"]
        wanted, found = fetch(self._fs, [source, copy], [size, size])
        if isinstance(wanted, Exception):
            raise wanted
        if found != wanted:
            # `_try` repeats the comparison after this error.
            raise TimeoutError("the service has not finished its copy")

    def remove(self, path: str) -> None:
        """Deletes an object if it exists. On a local disk, a folder of that name is deleted too."""
        if self.is_local:
            self._try(lambda: local_disk.remove(self._inside(path)), path)
            return

        def removed() -> None:
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(f"{self.root}/{path}")

        self._try(removed, path)

    def remove_folder(self, path: str) -> None:
        """Deletes a local folder and its contents if it exists. Does nothing in a bucket, which has no folders."""
        if self.is_local:
            self._try(lambda: local_disk.remove_folder(str(self._inside(path))), path)

    def remove_partials(self, path: str) -> int:
        """Deletes partial files that killed writers left in a folder at least a day ago. Returns their number.

        Partial files exist only on a local disk. Staged objects are not partial files; `protocol.clean` removes them.
        """
        if not self.is_local:
            return 0
        return self._try(lambda: local_disk.remove_partials(self._inside(os.path.join(path, "any")).parent), path)

    def _inside(self, path: str) -> Path:
        """Returns the local path of an object. Raises PermissionError if a symbolic link leads out of the root."""
        full = Path(f"{self.root}/{path}")
        if not full.parent.resolve().is_relative_to(Path(f"{self.root}/").resolve()):
            raise PermissionError(
                f"{full} lies behind a symbolic link that leads out of the store; copy the files into the store"
            )
        return full

    def _make_root(self) -> None:
        """Creates the root folder on a local disk before the first write."""
        if os.path.isdir(f"{self.root}/"):
            return
        try:
            local_disk.make_folder(Path(self.root))
        except OSError as error:
            kind = StorageRefusedError if is_refusal(error) else ValueError
            raise kind(
                f"url must be a folder that can be created, got url={self.url} ({error.strerror}: {error.filename}); "
                "give another"
            ) from error

    def for_each(self, action: Callable[[U], T], items: Iterable[U]) -> list[T]:
        """Calls `action` for each item, in parallel threads for a bucket. Returns the results in order of the items."""
        if self.is_local:
            return [action(item) for item in items]
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            return list(pool.map(action, items))

    @contextlib.contextmanager
    def _there_to_write(self, path: str) -> Iterator[None]:
        """Context manager that turns a FileNotFoundError into a StorageRefusedError.

        If a write raises FileNotFoundError, the bucket is missing.
        """
        try:
            yield
        except FileNotFoundError as error:
            raise StorageRefusedError(
                f"there is no bucket or folder to write to at {self.url} (FileNotFoundError: {error}); "
                "check the URL, the credentials and --storage_options"
            ) from error

    def _try(self, operation: Callable[[], T], path: str) -> T:
        """Runs an operation. If it fails and a retry may help, waits and runs it again."""
        started, wait = time.monotonic(), FIRST_WAIT_S
        while True:
            try:
                result = operation()
            except (FileNotFoundError, FormatError):
                # The service has answered: it said that the object is missing, or sent malformed content.
                self._has_answered = True
                raise
            except Exception as error:  # Drivers raise the exceptions of many libraries, so all are caught.
                where = f"{self.url} at {path or '/'} ({type(error).__name__}: {' '.join(str(error).split()):.300})"
                if is_refusal(error):
                    raise StorageRefusedError(
                        f"{cause(error)} for {where}; check the disk, the bucket, the credentials and "
                        "--storage_options, then run the same command again"
                    ) from error
                patience = PATIENCE_S if self._has_answered else FIRST_PATIENCE_S
                if self.is_local or not may_pass(error) or time.monotonic() + wait > started + patience:
                    raise StorageError(
                        f"cannot read or write {where}; check the bucket, the credentials and "
                        "--storage_options, then run the same command again"
                    ) from error
            else:
                self._has_answered = True
                return result
            # The random factor spreads the retries of processes whose requests failed at the same time.
            time.sleep(wait * random.uniform(0.5, 1.0))
            wait = min(2 * wait, LONGEST_WAIT_S)
