"""The options of an fsspec file system: where they come from.

They may hold credentials: no message here shows any of their content.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

VARIABLE = "LOGITSTORE_STORAGE_OPTIONS"
"""Environment variable for what `--storage_options` would name, or for the options themselves."""


def storage_options(path: str | None) -> dict[str, Any] | None:
    """Reads fsspec options from a JSON file, or from the environment.

    A file holds one JSON object, whose fields are the arguments of the file system's class, such as
    `{"key": "...", "secret": "...", "endpoint_url": "..."}` for s3fs.

    Under these lie those that fsspec is configured with itself (FSSPEC_S3_KEY and the like, files in ~/.config/fsspec),
    which a Storage takes along to other machines too, and what drivers find by themselves, such as AWS_* variables,
    `~/.aws` or a machine's role: each machine must have that of its own.

    Args:
        path: The file. It wins over the environment, whole: the two are not merged. None: the environment variable
            LOGITSTORE_STORAGE_OPTIONS, which holds the path of such a file, or the object itself if it begins with
            `{`; an empty one counts as none.

    Returns:
        The options, None where neither is given.

    Raises:
        ValueError: The file cannot be read, or what is given is no JSON object. The message has the name of the file
            or of the variable, and the position of the error.
    """
    if path is None:
        value = os.environ.get(VARIABLE, "").strip()
        if value.startswith("{"):
            return _parsed(value, VARIABLE, "a value")
        if not value:
            return None
        # Not shown even if it seems to be a path: it may be JSON with a quote too many before it.
        content = _content(value, VARIABLE, "a value, not shown, that does not begin with {")
        return _parsed(content, VARIABLE, "the path of a file")
    if path.lstrip().startswith("{"):
        raise ValueError(
            "storage_options must be the path of a JSON file, got JSON itself (not shown); "
            f"write it to a file, or to the environment variable {VARIABLE}"
        )
    shown = f"storage_options={path}"
    return _parsed(_content(path, "storage_options", shown), "storage_options", shown)


def _content(path: str, name: str, shown: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        reason = error.strerror
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
        fault = f"a {type(options).__name__}, no object"
    # Raised out here to be unchained: the parser's own error carries the whole text.
    raise ValueError(f'{name} must be a JSON file with an object, got {shown} with {fault}; write {{"option": value}}')


def options_for(data: str, store: str | None, options: dict[str, Any] | None) -> dict[str, Any] | None:
    """Returns the options for reading `--data`: the store's, if both lie on the same kind of file system.

    Args:
        data: Path or URL of the data.
        store: URL of the store; None where there is none, and the options are meant for the data.
        options: What --storage_options holds.
    """
    protocol = data.partition("://")[0] if "://" in data else None
    if protocol is None or (store is not None and not store.startswith(f"{protocol}://")):
        return None
    return options


AZURE = ("abfs", "abfss", "az")


def without_credentials(url: str) -> str:
    """Drops `user:password@` from a URL, so that it may be stored and printed.

    In `abfs://CONTAINER@ACCOUNT.dfs.core.windows.net` it is the container that stands before the @, and stays.
    """
    scheme, separator, rest = url.partition("://")
    authority, slash, path = rest.partition("/")
    user, at, host = authority.rpartition("@")
    if scheme in AZURE and at:
        host = f"{user.partition(':')[0]}@{host}"
    return f"{scheme}{separator}{host}{slash}{path}" if separator else url
