"""Finds the files, or the data set on the hub, that `--data` names. Reads no record and does not tokenise."""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from fsspec.implementations.local import LocalFileSystem

from logitstore.errors import LogitStoreError, StorageError
from logitstore.storage.filesystems import open_fs
from logitstore.storage.options import Url

if TYPE_CHECKING:
    from collections.abc import Iterator

FORMATS: dict[str, Literal["jsonl", "parquet", "text"]] = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
}
"""Formats of data files, keyed by suffix. A suffix for compression may follow, as in `.jsonl.gz`."""
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst", ".lz4")
"""Suffixes of compressed data files."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """The files, or the data set on the hub, that --data names. The contents of the files are not included."""

    name: str
    """Value of --data, without credentials."""
    format: Literal["jsonl", "parquet", "text", "hub"]
    """Format of all files; "hub" for a data set on the hub."""
    files: tuple[str, ...] = ()
    """Path of each file in `fs`, in the order in which the files are read; empty for a data set on the hub."""
    names: tuple[str, ...] = ()
    """Name of each file in messages: its URL without credentials, or its local path."""
    digest: str | None = None
    """sha256 over path, size and change mark (fsspec's `ukey`) of each file; None for a data set on the hub."""
    fs: Any = field(default=None, repr=False)
    """fsspec file system that holds the files; None for a data set on the hub."""


def find_source(data: str, storage_options: dict[str, Any] | None) -> Source:
    """Lists the files that --data names, without reading them. Does not access a data set on the hub.

    If --data names a folder, all files below the folder are listed in the order of their paths. Files and folders whose
    name begins with "." or "_" are skipped.

    Args:
        data: Path or URL of a file, a glob or a folder; or hf:name[:split].
        storage_options: Options for the fsspec file system of the URL, such as credentials.

    Raises:
        ValueError: No file was found, or the files have an unknown format or several formats.
        MissingDriverError: No installed package can open such a URL.
        StorageError: The URL cannot be reached, or the credentials are not accepted.
    """
    name = str(Url(data))
    if data.startswith("hf:") and not data.startswith("hf://"):
        return Source(name=name, format="hub")
    with reached(name):
        return _find(data, name, storage_options)


@contextlib.contextmanager
def reached(name: str) -> Iterator[None]:
    """Context manager that turns any error of a file system into a StorageError with a one-line message.

    ValueError and LogitStoreError pass unchanged.

    Args:
        name: Value of --data without credentials, for the message.
    """
    try:
        yield
    except (ValueError, LogitStoreError):
        raise
    except Exception as error:  # Each driver raises the exceptions of its own service's library.
        raise StorageError(
            f"data must be at a URL that can be read, got data={name} ({type(error).__name__}: "
            f"{' '.join(str(error).split()):.300}); check the bucket, the credentials and --storage_options"
        ) from error


def _find(data: str, name: str, storage_options: dict[str, Any] | None) -> Source:
    fs, path = open_fs(Url(data), storage_options)
    fs.invalidate_cache()  # fsspec keeps the listings of earlier calls, which may be out of date.
    # Existing files and folders are tried first: if their name has brackets, it must not be read as a glob.
    if fs.isfile(path):
        files = [path]
    elif fs.isdir(path):
        base = path.rstrip("/") + "/"
        files = [
            file
            for file in sorted(fs.find(path))
            if not any(part.startswith((".", "_")) for part in file.removeprefix(base).split("/"))
        ]
    else:
        files = sorted(file for file in fs.glob(path) if fs.isfile(file)) if any(c in path for c in "*?[") else []
    if not files:
        raise ValueError(
            f"data must name a file, a folder or a glob that matches files, got data={name}, where no file was "
            "found; check the path, or give hf:name for a data set on the hub"
        )
    formats = {FORMATS.get(suffixes_of(file)[0]) for file in files}
    known = formats.pop()
    if formats or known is None:
        suffixes = sorted({suffixes_of(file)[0] or "no suffix" for file in files})
        raise ValueError(
            f"data must be files of a single format ({', '.join(FORMATS)}; compressed or not), got data={name} with "
            f"{', '.join(suffixes)}; give a glob that matches the files of one format"
        )
    # No file is read for the digest. The digest still changes when a file is replaced, because `ukey` changes.
    sha = hashlib.sha256()
    for file in files:
        sha.update(json.dumps([file, fs.info(file)["size"], str(fs.ukey(file))]).encode())
    local = isinstance(fs, LocalFileSystem)
    return Source(
        name=name,
        format=known,
        files=tuple(files),
        names=tuple(files if local else [str(Url(fs.unstrip_protocol(file))) for file in files]),
        digest=f"sha256:{sha.hexdigest()}",
        fs=fs,
    )


def suffixes_of(file: str) -> tuple[str, str]:
    """Splits the suffixes of a file name by their meaning.

    Returns:
        The suffix that determines the format, in lower case, and the suffix of the compression. Each is '' if the file
        name has no such suffix.
    """
    path = PurePosixPath(file)
    compression = path.suffix if path.suffix in COMPRESSIONS else ""
    return PurePosixPath(file.removesuffix(compression)).suffix.lower(), compression
