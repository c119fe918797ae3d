"""Where a store's bytes lie: a local folder or any fsspec URL. Nothing here knows what a store holds."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import fsspec
import zarr
from fsspec.core import split_protocol
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import known_implementations
from zarr.errors import ContainsGroupError

from logitstore.errors import FormatError, LogitStoreError, MissingDriverError, StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator


def open_fs(url: str, storage_options: dict[str, Any] | None = None) -> tuple[Any, str]:
    """Returns the fsspec file system of a URL, and the path in it.

    Raises:
        MissingDriverError: No installed package opens this protocol; the message names the one that would.
    """
    protocol = split_protocol(url)[0]
    if protocol is not None and protocol not in fsspec.available_protocols():
        raise MissingDriverError(
            f"url must have a protocol that fsspec knows, got url={without_credentials(url)}; "
            "give a folder, s3://, gs:// or abfs://, or install the package that registers this protocol"
        )
    try:
        fs, path = fsspec.url_to_fs(url, **(storage_options or {}))
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


def without_credentials(url: str) -> str:
    """Drops `user:password@` from a URL, so that it may be stored and printed."""
    scheme, separator, rest = url.partition("://")
    authority, slash, path = rest.partition("/")
    return f"{scheme}{separator}{authority.rpartition('@')[2]}{slash}{path}" if separator else url


def read_options(path: str | None) -> dict[str, Any] | None:
    """Reads fsspec options from a JSON file; None for no file.

    Raises:
        ValueError: The file is missing or holds something else than a JSON object.
    """
    if path is None:
        return None
    try:
        options = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"storage_options must be a JSON file, got storage_options={path}: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"storage_options must hold a JSON object, got {type(options).__name__} in {path}")
    return options


class Storage:
    """One root folder, local or remote, and the few things a store does with it.

    Attributes:
        url: The root as given, without credentials.
    """

    def __init__(self, url: str | os.PathLike[str], storage_options: dict[str, Any] | None = None) -> None:
        raw = os.fspath(url)
        self._raw_url = raw
        self._options = dict(storage_options or {})
        self.url = without_credentials(raw).rstrip("/")
        self._fs, path = open_fs(raw, storage_options)
        self.root = path.rstrip("/")
        self.is_local = isinstance(self._fs, LocalFileSystem)
        if self.is_local:  # a process that this goes to may run in another folder
            self._raw_url = self.root

    def __reduce__(self) -> tuple[type[Storage], tuple[str, dict[str, Any]]]:
        return Storage, (self._raw_url, self._options)

    def _zarr_store(self, mode: str) -> zarr.storage.LocalStore | zarr.storage.FsspecStore:
        if self.is_local:
            return zarr.storage.LocalStore(self.root, read_only=mode == "r")
        return zarr.storage.FsspecStore.from_url(
            self._raw_url, storage_options=self._options or None, read_only=mode == "r"
        )

    def zarr_group(self, path: str, *, mode: Literal["r", "r+"] = "r") -> zarr.Group:
        """Opens a group below the root, to read ("r") or to write ("r+")."""
        return zarr.open_group(self._zarr_store(mode), path=path, mode=mode, zarr_format=3, use_consolidated=False)

    def create_group(self, path: str, attributes: dict[str, Any]) -> None:
        """Creates a group and its attributes in one write; one that is there already stays as it is."""
        with self._reachable("written"), contextlib.suppress(ContainsGroupError):
            zarr.create_group(self._zarr_store("r+"), path=path, zarr_format=3, attributes=attributes)

    def remove(self, path: str) -> None:
        """Deletes a folder and all in it."""
        self._fs.rm(f"{self.root}/{path}", recursive=True)

    @contextlib.contextmanager
    def _reachable(self, verb: str) -> Iterator[None]:
        """Drivers raise whatever their services' libraries do: a first contact that fails becomes one clear error."""
        try:
            yield
        except LogitStoreError:
            raise
        except Exception as error:
            raise StorageError(
                f"url must be one that can be {verb}, got url={self.url} ({type(error).__name__}: {error}); check the "
                "bucket, the credentials and --storage_options"
            ) from error

    def group_attributes(self, path: str) -> dict[str, Any] | None:
        """Reads the attributes of a group, None where there is no group.

        Raises:
            FormatError: There is one, but not of Zarr version 3.
        """
        with self._reachable("read"):
            try:
                metadata = self.get_json(f"{path}/zarr.json" if path else "zarr.json")
            except (FileNotFoundError, NotADirectoryError):
                return None
        if not isinstance(metadata, dict) or metadata.get("node_type") != "group":
            raise FormatError(f"{path}/zarr.json must describe a Zarr group, got {metadata!r:.80}; this is no store")
        attributes = metadata.get("attributes", {})
        if not isinstance(attributes, dict):
            raise FormatError(f"attributes must be a JSON object, got attributes={attributes!r:.80}; this is no store")
        return attributes

    def names(self, path: str) -> list[str]:
        """Lists the names in a folder, sorted; empty where there is no such folder."""
        folder = f"{self.root}/{path}"
        self._fs.invalidate_cache(folder)
        try:
            found = self._fs.ls(folder, detail=False)
        except FileNotFoundError:
            return []
        names = {str(entry).rstrip("/").rsplit("/", 1)[1] for entry in found}
        return sorted(name for name in names if not name.endswith(".partial"))

    def get_json(self, path: str) -> Any:  # noqa: ANN401
        """Reads one small JSON file.

        Raises:
            FileNotFoundError: There is none.
            FormatError: It holds no JSON.
        """
        return self._parse(path, self._fs.cat_file(f"{self.root}/{path}"))

    def get_many_json(self, paths: list[str]) -> list[Any]:
        """Reads many small JSON files, concurrently where the file system can."""
        full = [f"{self.root}/{path}" for path in paths]
        data = self._fs.cat(full, recursive=False) if full else {}
        if isinstance(data, bytes):  # fsspec answers a list of one with the content alone
            data = {full[0]: data}
        by_name = {key.rsplit("/", 1)[1]: value for key, value in data.items()}
        return [self._parse(path, by_name[path.rsplit("/", 1)[1]]) for path in paths]

    def put_json(self, path: str, value: object) -> None:
        """Writes one small JSON file whole or not at all: rename on a local disk, one PUT elsewhere."""
        data = (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()
        if not self.is_local:
            self._fs.pipe_file(f"{self.root}/{path}", data)
            return
        final = Path(self.root, path)
        final.parent.mkdir(parents=True, exist_ok=True)
        partial = final.with_name(f"{final.name}.{uuid.uuid4().hex}.partial")
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(final)
        finally:
            partial.unlink(missing_ok=True)

    def num_bytes(self, path: str) -> int:
        """Adds up the sizes of all objects below a folder."""
        folder = f"{self.root}/{path}"
        self._fs.invalidate_cache(folder)
        return int(self._fs.du(folder))

    @staticmethod
    def _parse(path: str, data: bytes) -> Any:  # noqa: ANN401
        try:
            return json.loads(data)
        except ValueError as error:
            raise FormatError(f"{path} must be JSON, got {data[:40]!r}; restore it from a copy of the store") from error
