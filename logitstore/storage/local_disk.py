"""Reads and writes files of a local disk. Every file is written whole or not at all.

A file is written to a partial name in the same folder and synced. Then it is renamed or linked to its final name, and
the folder is synced.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import time
import uuid
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PARTIAL = ".partial"
"""Suffix of the names of files that are being written, or that a killed writer left behind."""
NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV})
"""Error numbers of os.link that mean that a hard link is impossible: the file system has no hard links, the file has
too many of them already, or the two names are on different file systems."""
ABANDONED_S = 24 * 60 * 60
"""Age in seconds after which a partial file no longer belongs to a running writer."""


def read(path: str, size: int) -> bytes | Exception:
    """Reads at most `size` bytes from the beginning of a file.

    Returns:
        The bytes, or an OSError, which is returned instead of raised. FileNotFoundError means that the path does not
        exist or is not a regular file.
    """
    try:
        # O_NONBLOCK, because opening a named pipe would wait for its writer forever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                return FileNotFoundError(f"{path} is not a regular file")
            with open(descriptor, "rb", closefd=False) as file:
                # read() allocates as many bytes as are requested, so the request is limited to the file's size.
                return file.read(min(size, status.st_size))
        finally:
            os.close(descriptor)
    except (NotADirectoryError, IsADirectoryError) as error:
        return FileNotFoundError(str(error))
    except OSError as error:
        # The traceback of a returned error would keep the stack frames of the callers alive, and the arrays in them.
        return error.with_traceback(None)


def put(final: Path, data: bytes) -> None:
    """Writes a file. Replaces an existing file of this name."""
    with partial_file(final) as partial:
        _write(partial, data)
        _replace(partial, final)


def create(final: Path, data: bytes) -> bool:
    """Writes a file if its name is free. Of several callers at the same time, exactly one succeeds.

    On a file system without hard links, this holds only for callers that see each other's file locks.

    Returns:
        Whether this call created the file.
    """
    with partial_file(final) as partial:
        _write(partial, data)
        # Unlike a rename, a link fails if the final name exists.
        try:
            os.link(partial, final)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            return _rename_if_free(partial, final)
        return True


def copy(source: Path, final: Path) -> None:
    """Creates a second name for a file by a hard link. Copies the file if hard links are impossible.

    Replaces an existing file with the final name.

    Raises:
        FileNotFoundError: The source does not exist.
    """
    # The partial file is beside the source, in the staging folder. If this process is killed, the partial file is
    # removed when the staging folder is cleaned.
    with partial_file(final, beside=source) as partial:
        try:
            os.link(source, partial)
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            with source.open("rb") as data, partial.open("xb") as file:
                shutil.copyfileobj(data, file)
                file.flush()
                os.fsync(file.fileno())
        _replace(partial, final)


def remove(path: Path) -> None:
    """Deletes a file or a folder. Does nothing if the path does not exist."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        try:
            path.unlink()
        except IsADirectoryError:
            shutil.rmtree(path)


def num_bytes(folder: str) -> int:
    """Returns the total size in bytes of the files below a folder, excluding partial files.

    Files that are deleted during the call may or may not be included.
    """
    total = 0
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                total += num_bytes(entry.path)
            elif not entry.name.endswith(PARTIAL):
                with contextlib.suppress(FileNotFoundError):
                    total += entry.stat(follow_symlinks=False).st_size
    return total


def remove_folder(folder: str) -> None:
    """Deletes a folder and its content. Does nothing if the folder does not exist.

    Other processes may delete the same folder or write to it at the same time. Files that they write may remain.
    """
    # If the folder is a symbolic link, only the link is deleted: its target does not belong to the store.
    if os.path.islink(folder):
        os.unlink(folder)
        return
    with contextlib.suppress(FileNotFoundError):
        with os.scandir(folder) as entries:
            found = list(entries)
        for entry in found:
            if entry.is_dir(follow_symlinks=False):
                remove_folder(entry.path)
            else:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(entry.path)
        # The folder is not empty if another process has written to it since it was listed.
        try:
            os.rmdir(folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise


def remove_partials(folder: Path) -> int:
    """Deletes those partial files in a folder whose age is at least `ABANDONED_S`. Does not look into subfolders.

    Returns:
        Number of files that were deleted.
    """
    removed = 0
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(PARTIAL):
                with contextlib.suppress(FileNotFoundError):
                    # ctime is the time of the last link or write. mtime may be much older: `copy` links an existing
                    # file to a partial name, which leaves the mtime of the file unchanged.
                    if time.time() - entry.stat(follow_symlinks=False).st_ctime >= ABANDONED_S:
                        os.unlink(entry.path)
                        removed += 1
    return removed


def refresh(folder: Path) -> None:
    """Makes the next listing of a folder current. Creates the folder if it does not exist.

    A network file system may answer listings from its cache for up to a minute. A change to the folder by this machine
    invalidates that cache, so this function creates and deletes a file.
    """
    make_folder(folder)
    # The suffix marks the file as partial, so that listings leave it out.
    partial = folder / f"{uuid.uuid4().hex}{PARTIAL}"
    partial.touch()
    partial.unlink()


def _rename_if_free(partial: Path, final: Path) -> bool:
    """Renames a file if its final name is free.

    The check and the rename are one step only for processes that see each other's file locks.

    Returns:
        Whether the file was renamed.
    """
    # The lock on the folder makes the check and the rename one step for all processes that take the lock.
    descriptor = os.open(final.parent, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if final.exists():
            return False
        partial.replace(final)
        return True
    finally:
        os.close(descriptor)


def _replace(partial: Path, final: Path) -> None:
    try:
        partial.replace(final)
    except IsADirectoryError:  # A store has no folder of this name, so the folder was created by mistake.
        shutil.rmtree(final)
        partial.replace(final)


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def partial_file(final: Path, beside: Path | None = None) -> Iterator[Path]:
    """Context manager that yields a unique path for a partial file.

    The path is in the folder of `beside`, or in the folder of `final` if `beside` is None. On exit, the partial file is
    deleted, and the folder of `final` is synced if no error occurred.
    """
    make_folder(final.parent)
    # The random part gives each of several writers of the same file its own partial file.
    partial = (beside or final).with_name(f"{final.name}.{uuid.uuid4().hex}{PARTIAL}")
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)
    _sync_folder(final.parent)


def make_folder(folder: Path) -> None:
    """Creates a folder and its parents, if they do not exist. Syncs the parent of each new folder."""
    if not folder.is_dir():
        make_folder(folder.parent)
        # Another process may create the folder at the same time.
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    """Syncs a folder, so that the names of new files in it survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
