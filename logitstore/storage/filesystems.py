"""The fsspec file system of a URL, listings and bounded reads, and what failures mean: gone, busy, refused for good."""

from __future__ import annotations

import contextlib
import errno
import importlib
from typing import TYPE_CHECKING, Any

import fsspec
from fsspec.config import apply_config
from fsspec.core import split_protocol
from fsspec.registry import known_implementations, registry

from logitstore.errors import MissingDriverError
from logitstore.storage.options import without_credentials

if TYPE_CHECKING:
    from collections.abc import Sequence


S3 = ("s3", "s3a")


def open_fs(url: str, storage_options: dict[str, Any] | None = None, *, tries_again: bool = True) -> tuple[Any, str]:
    """Returns the fsspec file system of a URL, and the path in it.

    Args:
        url: A path or any fsspec URL.
        storage_options: What its file system needs.
        tries_again: Whether its driver may try again what fails, which is False where the caller does.

    Raises:
        MissingDriverError: No installed package opens this protocol; the message names the one that would.
    """
    protocol = split_protocol(url)[0]
    if protocol is not None and protocol not in known_implementations and protocol not in registry:
        raise MissingDriverError(
            f"url must have a protocol that fsspec knows, got url={without_credentials(url)}; "
            "give a folder, s3://, gs:// or abfs://, or install the package that registers this protocol"
        )
    try:
        options = storage_options or {}
        fs, path = fsspec.url_to_fs(url, **options) if tries_again or protocol not in S3 else _open_s3(url, options)
    except ImportError as error:
        package = known_implementations[protocol]["class"].split(".")[0] if protocol in known_implementations else ""
        try:
            importlib.import_module(package)
        except ImportError:
            raise MissingDriverError(
                f"url must have a protocol whose driver is installed, got url={without_credentials(url)}; "
                f"pip install {package}"
            ) from error
        raise
    return fs, path


def _open_s3(url: str, options: dict[str, Any]) -> tuple[Any, str]:
    """Opens a bucket so that each request is sent, and sent once.

    Left alone botocore sends it up to 5 times, s3fs has that done 5 times, and for reads all of it 5 times: of a server
    that accepts requests and never answers one would hear after half an hour. And s3fs answers one thread with what
    another has listed, even if that was before the first one's last write.
    """
    options = apply_config(fsspec.get_filesystem_class("s3"), options)
    config = {"retries": {"total_max_attempts": 1}} | (options.get("config_kwargs") or {})
    fs, path = fsspec.url_to_fs(url, **options | {"config_kwargs": config, "use_listings_cache": False})
    fs.retries = 1
    return fs, path


def fetch(fs: Any, paths: Sequence[str], limits: Sequence[int]) -> list[bytes | Exception]:  # noqa: ANN401
    """Reads objects from a file system, all at once where it can.

    Args:
        fs: An fsspec file system.
        paths: Which.
        limits: As many as `paths`. No more than this many bytes and one are asked for: a longer object costs no more.

    Returns:
        For each the bytes, or what the file system raised for it; FileNotFoundError if it is not there.
    """
    ends = [limit + 1 for limit in limits]
    answers = fs.cat_ranges(list(paths), [0] * len(paths), ends, on_error="return")
    return [
        # A server that knows no ranges sends everything.
        answer[:end] if isinstance(answer, bytes) else _without_range(fs, path, answer)
        for path, end, answer in zip(paths, ends, answers, strict=True)
    ]


def listed(fs: Any, folder: str) -> set[str]:  # noqa: ANN401
    """Lists the names in a folder of a bucket, and leaves none of them in the file system's memory."""
    fs.invalidate_cache(folder)
    try:
        found = fs.ls(folder, detail=False)
    finally:
        fs.invalidate_cache(folder)
    # Object stores may list the folder's own marker.
    entries = (str(entry).rstrip("/") for entry in found)
    return {entry.rsplit("/", 1)[1] for entry in entries if len(entry) > len(folder)}


def sizes(fs: Any, folder: str) -> dict[str, int]:  # noqa: ANN401
    """Lists all objects below a folder of a bucket. Not by `du`: s3fs looks at all of them for each of them."""
    fs.invalidate_cache(folder)
    try:
        found = fs.find(folder, detail=True)
    except FileNotFoundError:
        return {}
    finally:
        fs.invalidate_cache(folder)
    return {str(name): int(info["size"] or 0) for name, info in found.items()}


def _without_range(fs: Any, path: str, error: Exception) -> bytes | Exception:  # noqa: ANN401
    """An empty object has no range: services answer with an error (HTTP 416), which each driver renders in its way."""
    status = getattr(error, "status", None) or getattr(error, "code", None)
    if str(status) == "416" or getattr(error, "errno", None) == errno.EINVAL:
        with contextlib.suppress(Exception):  # the first error is the one to report
            fs.invalidate_cache(path)
            if fs.info(path)["size"] == 0:
                return b""
    return error
