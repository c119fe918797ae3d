"""Files of a local disk, written whole or not at all: to another name beside, synced, then renamed or linked."""

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
"""Ends the names of files that are being written, or that a killed writer left."""
NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV})
"""What file systems without hard links say to one, or that a file has all that it may have."""
ABANDONED_S = 24 * 60 * 60
"""A file that is still partial after this long is nobody's any more."""


def read(path: str, size: int) -> bytes | Exception:
    """Returns at most `size` bytes of a file, or why not: FileNotFoundError where there is none, folders included."""
    try:
        # Not to wait for ever at a named pipe that somebody put into a store.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                return FileNotFoundError(f"{path} is no file")
            with open(descriptor, "rb", closefd=False) as file:
                return file.read(min(size, status.st_size))  # asked for more, it sets as much memory aside
        finally:
            os.close(descriptor)
    except (NotADirectoryError, IsADirectoryError) as error:
        return FileNotFoundError(str(error))
    except OSError as error:
        return error


def put(final: Path, data: bytes) -> None:
    """Writes a file in the place of what was there."""
    with _partial(final) as partial:
        _write(partial, data)
        _replace(partial, final)


def create(final: Path, data: bytes) -> bool:
    """Writes a file where there is none; of several that try at once one succeeds. Returns whether this one did."""
    with _partial(final) as partial:
        _write(partial, data)
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
    """Gives a file a second name, in the place of what was there.

    Raises:
        FileNotFoundError: The source is not there.
    """
    # Beside the source, so that it goes with what is staged if this process is killed.
    with _partial(final, beside=source) as partial:
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
    """Deletes a file, or a folder that lies in a file's place, if there is one."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        try:
            path.unlink()
        except IsADirectoryError:
            shutil.rmtree(path)


def num_bytes(folder: str) -> int:
    """Adds up the sizes of the files in a folder. What vanishes meanwhile counts or not."""
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
    """Deletes a folder and all in it. Others may do so too, or write to it: what they write meanwhile may stay."""
    if os.path.islink(folder):  # what it leads to is not the store's
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
        try:
            os.rmdir(folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise


def remove_partials(folder: Path) -> int:
    """Deletes what killed writers left in a folder, but not in those below. Returns how many files."""
    removed = 0
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(PARTIAL):
                with contextlib.suppress(FileNotFoundError):
                    # Of its last link or write: a file may be older than its name.
                    if time.time() - entry.stat(follow_symlinks=False).st_ctime >= ABANDONED_S:
                        os.unlink(entry.path)
                        removed += 1
    return removed


def refresh(folder: Path) -> None:
    """Makes the next listing of a folder one of this moment: it is made if there is none.

    A network file system may answer from memory for a minute, but not once this machine itself has changed the folder.
    """
    make_folder(folder)
    partial = folder / f"{uuid.uuid4().hex}{PARTIAL}"
    partial.touch()
    partial.unlink()


def _rename_if_free(partial: Path, final: Path) -> bool:
    """Gives a file its name where no other has it. Only processes that see each other's locks exclude each other."""
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
    except IsADirectoryError:  # no store has a folder there: somebody's mistake, and in the way
        shutil.rmtree(final)
        partial.replace(final)


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _partial(final: Path, beside: Path | None = None) -> Iterator[Path]:
    """A name to write to, beside the final one if not elsewhere; gone afterwards, and the final folder synced."""
    make_folder(final.parent)
    partial = (beside or final).with_name(f"{final.name}.{uuid.uuid4().hex}{PARTIAL}")
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)
    _sync_folder(final.parent)


def make_folder(folder: Path) -> None:
    """Makes a folder, and those above it, where there is none."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    """A file's name outlasts a power cut only once the folder that holds it was synced."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
