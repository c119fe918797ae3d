"""Opens the fsspec file system of a URL, lists folders, and reads objects with a bound on their size."""

from __future__ import annotations

import contextlib
import errno
import importlib
from typing import TYPE_CHECKING, Any

import fsspec
from fsspec.config import apply_config
from fsspec.registry import known_implementations, registry

from logitstore.errors import MissingDriverError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from logitstore.storage.options import Url


S3 = ("s3", "s3a")
"""Protocols of S3 buckets, which `open_fs` can open without the driver's own retries."""


def open_fs(url: Url, storage_options: dict[str, Any] | None = None, *, tries_again: bool = True) -> tuple[Any, str]:
    """Returns the fsspec file system of a URL, and the path of the URL in that file system.

    Args:
        url: A path or any fsspec URL.
        storage_options: Options of the file system, such as credentials.
        tries_again: Whether the driver retries failed requests; False if the caller retries them.

    Raises:
        MissingDriverError: No installed package opens this protocol; the message names the package to install.
    """
    protocol = url.protocol
    if protocol is not None and protocol not in known_implementations and protocol not in registry:
        raise MissingDriverError(
            f"url must have a protocol that fsspec knows, got url={url}; "
            "give a folder, s3://, gs:// or abfs://, or install the package that registers this protocol"
        )
    try:
        options = storage_options or {}
        if tries_again or protocol not in S3:
            fs, path = fsspec.url_to_fs(url.raw, **options)
        else:
            fs, path = _open_s3(url.raw, options)
    except ImportError as error:
        package = known_implementations[protocol]["class"].split(".")[0] if protocol in known_implementations else ""
        # If the driver is installed, the ImportError has another reason and is raised unchanged.
        try:
            importlib.import_module(package)
        except ImportError:
            raise MissingDriverError(
                f"url must have a protocol whose driver is installed, got url={url}; pip install {package}"
            ) from error
        raise
    return fs, path


def _open_s3(url: str, options: dict[str, Any]) -> tuple[Any, str]:
    """Opens an S3 bucket without the driver's retries and without its cache of listings.

    By default, botocore tries each request 5 times. s3fs makes 5 rounds of these tries, and 5 times as many rounds for
    reads. If a server never answers, the error would therefore appear only after half an hour.

    With the cache of listings, a thread that has just written an object could get an outdated listing, which another
    thread requested before the write. This cache is therefore off.
    """
    options = apply_config(fsspec.get_filesystem_class("s3"), options)
    config = {"retries": {"total_max_attempts": 1}} | (options.get("config_kwargs") or {})
    fs, path = fsspec.url_to_fs(url, **options | {"config_kwargs": config, "use_listings_cache": False})
    fs.retries = 1
    return fs, path


def fetch(fs: Any, paths: Sequence[str], limits: Sequence[int]) -> list[bytes | Exception]:  # noqa: ANN401
    """Reads objects, concurrently if the file system supports it.

    Args:
        fs: An fsspec file system.
        paths: Paths of the objects.
        limits: Maximum size of each object in bytes. One more byte is requested, to recognise objects that are longer.

    Returns:
        For each path, the bytes of the object, or the exception that the file system raised. The exception is a
        FileNotFoundError if the object does not exist.
    """
    ends = [limit + 1 for limit in limits]
    answers = fs.cat_ranges(list(paths), [0] * len(paths), ends, on_error="return")
    return [
        # A server without support for ranges sends the whole object.
        answer[:end] if isinstance(answer, bytes) else _without_range(fs, path, answer)
        for path, end, answer in zip(paths, ends, answers, strict=True)
    ]


def listed(fs: Any, folder: str) -> set[str]:  # noqa: ANN401
    """Lists the names in a folder of a bucket. The file system's cache of listings is neither used nor filled."""
    fs.invalidate_cache(folder)
    try:
        found = fs.ls(folder, detail=False)
    finally:
        fs.invalidate_cache(folder)
    # Object stores may list the marker object of the folder itself.
    entries = (str(entry).rstrip("/") for entry in found)
    return {entry.rsplit("/", 1)[1] for entry in entries if len(entry) > len(folder)}


def sizes(fs: Any, folder: str) -> dict[str, int]:  # noqa: ANN401
    """Returns the sizes in bytes of all objects below a folder of a bucket, by path.

    fsspec's `du` is not used, because s3fs lists the whole folder again for each object.
    """
    fs.invalidate_cache(folder)
    try:
        found = fs.find(folder, detail=True)
    except FileNotFoundError:
        return {}
    finally:
        fs.invalidate_cache(folder)
    return {str(name): int(info["size"] or 0) for name, info in found.items()}


def _without_range(fs: Any, path: str, error: Exception) -> bytes | Exception:  # noqa: ANN401
    """Returns b"" if the error of a failed read means that the object is empty, and the error itself otherwise.

    Services answer a range request for an empty object with HTTP 416, which each driver raises in its own way.
    """
    status = getattr(error, "status", None) or getattr(error, "code", None)
    if str(status) == "416" or getattr(error, "errno", None) == errno.EINVAL:
        with contextlib.suppress(Exception):  # The first error is the one to report.
            fs.invalidate_cache(path)
            if fs.info(path)["size"] == 0:
                return b""
    return error
