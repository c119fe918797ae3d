"""Exceptions that a store raises about its own state. Bad arguments raise a plain ValueError.

The tree::

    LogitStoreError
    ├── StoreNotFoundError      (FileNotFoundError) the URL holds no store
    ├── FormatError             (ValueError)        this version cannot read the metadata
    ├── IdentityError           (ValueError)        the store differs from the requested one
    ├── LayerNotFoundError      (LookupError)       the store lacks the layer, or a shard of the layer is not committed
    ├── DamagedShardError       (OSError)           the stored bytes differ from the committed ones
    ├── FidelityError           (ValueError)        storing the rows would lose more than the budget
    ├── StorageError            (OSError)           the URL cannot be reached, even after retries
    │   └── StorageRefusedError (PermissionError)   no space, no permission, or no valid credentials
    └── MissingDriverError      (ImportError)       the URL needs a package that is not installed
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class LogitStoreError(Exception):
    """Base class of all errors that a store raises about its own state."""


class StoreNotFoundError(LogitStoreError, FileNotFoundError):
    """The URL holds no store."""


class FormatError(LogitStoreError, ValueError):
    """The metadata is malformed, does not belong to a store, or has a format version that this code cannot read."""


class IdentityError(LogitStoreError, ValueError):
    """The store was made with another tokenizer, other documents, another model or another scheme than requested."""


class LayerNotFoundError(LogitStoreError, LookupError):
    """The store does not have the layer, or one of the layer's shards is not committed yet."""


class DamagedShardError(LogitStoreError, OSError):
    """The stored bytes of a shard differ from its commit record. The message names the layer and the shard.

    Attributes:
        layer: Name of the damaged layer.
        shard: Number of the damaged shard.
        reason: Text that says what is wrong with the shard.
    """

    def __init__(self, layer: str, shard: int, reason: str) -> None:
        super().__init__(
            f"shard {shard} of layer {layer!r} is damaged: {reason}; "
            "run `logitstore verify` on the store to list all damage"
        )
        self.layer = layer
        self.shard = shard
        self.reason = reason

    def __reduce__(self) -> tuple[type[DamagedShardError], tuple[str, int, str]]:
        # Ray and worker processes pickle this error. By default, unpickling would pass only the message.
        return type(self), (self.layer, self.shard, self.reason)


class FidelityError(LogitStoreError, ValueError):
    """Storing the rows of a shard would lose more nats per row than the budget (max_kl) allows."""


class StorageError(LogitStoreError, OSError):
    """The URL cannot be read or written: the bucket does not exist, the network is down, or the service fails."""


class StorageRefusedError(StorageError, PermissionError):
    """The disk is full, permission is missing, or credentials are missing or expired. Retrying is pointless."""


class MissingDriverError(LogitStoreError, ImportError):
    """No installed package can open this kind of URL."""


def one_line(error: BaseException | str) -> str:
    """Returns the message of an error on one line: every run of whitespace becomes one space."""
    return " ".join(str(error).split())


def nearest(given: str, known: Iterable[str]) -> str:
    """Returns " (did you mean X?)" with the known name spelt most like the given one, or "" if none is similar."""
    names: dict[str, str] = {}
    for name in known:
        names.setdefault(name.replace("-", "_"), name)
    found = difflib.get_close_matches(given.partition("=")[0].replace("-", "_"), names, 1)
    return f" (did you mean {names[found[0]]}?)" if found else ""
