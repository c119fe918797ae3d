"""What --data names: the files behind it, and their records one by one. Knows nothing of tokens."""

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
from logitstore.storage.options import without_credentials

if TYPE_CHECKING:
    from collections.abc import Iterator

FORMATS: dict[str, Literal["jsonl", "parquet", "text"]] = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst", ".lz4")


@dataclass(frozen=True, kw_only=True)
class Source:
    """The files, or the hub's data set, that --data names; nothing is read yet."""

    name: str
    """As given, without credentials."""
    format: Literal["jsonl", "parquet", "text", "hub"]
    files: tuple[str, ...] = ()
    """Path of each file in its file system, in the order in which their documents come."""
    names: tuple[str, ...] = ()
    """What to call each file in a message: its URL without credentials, or its local path."""
    digest: str | None = None
    """sha256 over names, sizes and change marks of the files."""
    fs: Any = field(default=None, repr=False)
    """The fsspec file system they are in."""


def find_source(data: str, storage_options: dict[str, Any] | None) -> Source:
    """Lists the files that --data names, without reading any.

    Args:
        data: Path or URL of a file, a glob or a folder; or hf:name[:split].
        storage_options: What the URL's file system needs.

    Raises:
        ValueError: There is nothing there, or files of no or several known formats.
        MissingDriverError: No installed package opens such a URL.
        StorageError: The URL cannot be reached, or not with these credentials.
    """
    name = without_credentials(data)
    if data.startswith("hf:") and not data.startswith("hf://"):
        return Source(name=name, format="hub")
    with reached(name):
        return _find(data, name, storage_options)


@contextlib.contextmanager
def reached(name: str) -> Iterator[None]:
    """Says in one line what a file system says in its own ways."""
    try:
        yield
    except (ValueError, LogitStoreError):
        raise
    except Exception as error:  # drivers raise whatever their services' libraries do
        raise StorageError(
            f"data must be at a URL that can be read, got data={name} ({type(error).__name__}: "
            f"{' '.join(str(error).split()):.300}); check the bucket, the credentials and --storage_options"
        ) from error


def _find(data: str, name: str, storage_options: dict[str, Any] | None) -> Source:
    fs, path = open_fs(data, storage_options)
    fs.invalidate_cache()
    # An existing file first: its name may hold brackets, which would make a glob of it.
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
            f"data must name a file, a folder or a glob that matches files, got data={name}, where there is none; "
            "check the path, or give hf:name for a data set of the hub"
        )
    formats = {FORMATS.get(suffixes(file)[0]) for file in files}
    known = formats.pop()
    if formats or known is None:
        suffixes = sorted({suffixes(file)[0] or "no suffix" for file in files})
        raise ValueError(
            f"data must be files of one format out of {', '.join(FORMATS)} (compressed or not), got data={name} with "
            f"{', '.join(suffixes)}; give a glob that picks those meant"
        )
    sha = hashlib.sha256()
    for file in files:
        sha.update(json.dumps([file, fs.info(file)["size"], str(fs.ukey(file))]).encode())
    local = isinstance(fs, LocalFileSystem)
    return Source(
        name=name,
        format=known,
        files=tuple(files),
        names=tuple(files if local else [without_credentials(fs.unstrip_protocol(file)) for file in files]),
        digest=f"sha256:{sha.hexdigest()}",
        fs=fs,
    )


def suffixes(file: str) -> tuple[str, str]:
    """Returns the suffix that tells the format, and that of a compression or ''."""
    path = PurePosixPath(file)
    compression = path.suffix if path.suffix in COMPRESSIONS else ""
    return PurePosixPath(file.removesuffix(compression)).suffix.lower(), compression
