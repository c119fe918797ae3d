"""URLs, and the options of their fsspec file systems. Both may hold credentials.

Error messages of this module never show the values of options.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VARIABLE = "LOGITSTORE_STORAGE_OPTIONS"
"""Environment variable that holds the path of an options file, or the JSON object itself."""


def storage_options(path: str | None) -> dict[str, Any] | None:
    """Reads fsspec options from a JSON file, or from the environment.

    A file holds one JSON object, whose fields are the arguments of the file system's class, such as
    `{"key": "...", "secret": "...", "endpoint_url": "..."}` for s3fs.

    These options override the options in fsspec's configuration (variables such as FSSPEC_S3_KEY, and files in
    ~/.config/fsspec). A Storage that is sent to another machine includes both kinds of options. Credentials that
    drivers find by themselves, such as AWS_* variables, `~/.aws` or the role of a machine, must exist on each machine.

    Args:
        path: Path of the file. If it is given, the environment is ignored. If it is None, the environment variable
            LOGITSTORE_STORAGE_OPTIONS is read instead: it holds the path of such a file, or the JSON object itself if
            its value begins with `{`. An empty variable is ignored.

    Returns:
        The options; None if neither the file nor the variable is given.

    Raises:
        ValueError: The file cannot be read, or does not hold a JSON object. The message names the file or the variable,
            and the position of the error.
    """
    if path is None:
        value = os.environ.get(VARIABLE, "").strip()
        if value.startswith("{"):
            return _parsed(value, VARIABLE, "a value")
        if not value:
            return None
        # The value is not shown even if it looks like a path: it may be JSON with a stray quote before it.
        content = _content(value, VARIABLE, "a value, not shown, that does not begin with {")
        return _parsed(content, VARIABLE, "the path of a file")
    if path.lstrip().startswith("{"):
        raise ValueError(
            "storage_options must be the path of a JSON file, got JSON itself (not shown); "
            f"save it to a file and give the path, or put it into the environment variable {VARIABLE}"
        )
    shown = f"storage_options={path}"
    return _parsed(_content(path, "storage_options", shown), "storage_options", shown)


def _content(path: str, name: str, shown: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        reason = error.strerror
    # The error is raised outside the except block, so that it is not chained to the OSError, which shows the path. The
    # path may be a secret.
    raise ValueError(f"{name} must be a JSON file, got {shown} ({reason}); give the path of a file that can be read")


def _parsed(text: str | bytes, name: str, shown: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        fault = f"an error at line {error.lineno} column {error.colno}"
    except UnicodeDecodeError as error:
        fault = f"an error at byte {error.start}"
    else:
        if isinstance(options, dict):
            return options
        fault = f"a {type(options).__name__}, not an object"
    # The error is raised outside the except blocks, so that it is not chained to the parser's error, which holds the
    # whole text.
    raise ValueError(f'{name} must be a JSON file with an object, got {shown} with {fault}; write {{"option": value}}')


AZURE = ("abfs", "abfss", "az")
"""Protocols whose URLs name a container before the @, where other URLs have credentials."""


@dataclass(frozen=True, slots=True)
class Url:
    """A path or URL. Its `str` and `repr` leave out credentials; only `raw`, which the driver gets, includes them."""

    raw: str = field(repr=False)
    """The path or URL as it was given."""

    @property
    def protocol(self) -> str | None:
        """Protocol of the URL; None for a path."""
        return self.raw.partition("://")[0] if "://" in self.raw else None

    def __str__(self) -> str:
        """Returns the URL without `user:password@`, so that it can be stored and printed safely.

        In `abfs://CONTAINER@ACCOUNT.dfs.core.windows.net` the part before the @ is the container, which is kept.
        """
        scheme, separator, rest = self.raw.partition("://")
        authority, slash, path = rest.partition("/")
        user, at, host = authority.rpartition("@")
        if scheme in AZURE and at:
            host = f"{user.partition(':')[0]}@{host}"
        return f"{scheme}{separator}{host}{slash}{path}" if separator else self.raw

    def __repr__(self) -> str:
        return f"Url({str(self)!r})"


def without_credentials(url: str) -> str:
    """Returns a path or URL without the credentials in it."""
    return str(Url(url))


def options_for(data: str, store: str | None, options: dict[str, Any] | None) -> dict[str, Any] | None:
    """Returns the storage options with which the files of `--data` are read.

    Args:
        data: Path or URL of the data.
        store: URL of the store. If there is no store (None), the options are meant for the data.
        options: The contents of `--storage_options`.

    Returns:
        `options`; None for local data, or if the store has another protocol than the data.
    """
    # The same options are given for the store and for the data. They suit both only if the protocols are equal.
    protocol = data.partition("://")[0] if "://" in data else None
    if protocol is None or (store is not None and not store.startswith(f"{protocol}://")):
        return None
    return options
