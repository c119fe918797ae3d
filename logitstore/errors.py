"""The exceptions that a store raises about its own state. Bad arguments raise plain ValueError.

LogitStoreError
├── StoreNotFoundError      (FileNotFoundError)  no store at this URL
├── FormatError             (ValueError)         metadata that this version cannot read
├── IdentityError           (ValueError)         the store holds something other than what was asked for
├── LayerNotFoundError      (LookupError)        no such layer, or a shard of it is not committed
├── DamagedShardError       (OSError)            stored bytes differ from what was committed
├── FidelityError           (ValueError)         what would be stored is further from the target than was allowed
├── StorageError            (OSError)            the URL cannot be reached, even after some tries
│   └── StorageRefusedError (PermissionError)    no space, no permission, no valid credentials
└── MissingDriverError      (ImportError)        the URL needs a package that is not installed
"""

from __future__ import annotations


class LogitStoreError(Exception):
    """Base of everything that a store raises about its own state."""


class StoreNotFoundError(LogitStoreError, FileNotFoundError):
    """There is no store at the URL."""


class FormatError(LogitStoreError, ValueError):
    """The metadata is not that of a store, is malformed, or has a format version that this code cannot read."""


class IdentityError(LogitStoreError, ValueError):
    """The store was made from another tokenizer, other documents, another model or scheme than the one given."""


class LayerNotFoundError(LogitStoreError, LookupError):
    """The store has no such layer, or one of its shards is not committed yet."""


class DamagedShardError(LogitStoreError, OSError):
    """Stored bytes differ from what the commit record says. Names the layer and the shard.

    Attributes:
        layer: The damaged layer.
        shard: The damaged shard.
    """

    def __init__(self, layer: str, shard: int, reason: str) -> None:
        super().__init__(
            f"shard {shard} of layer {layer!r} must be as committed, got {reason}; "
            "run `logitstore verify` on the store to list all damage"
        )
        self.layer = layer
        self.shard = shard
        self.reason = reason

    def __reduce__(self) -> tuple[type[DamagedShardError], tuple[str, int, str]]:
        # It comes from other processes: an exception is built anew from its message alone.
        return type(self), (self.layer, self.shard, self.reason)


class FidelityError(LogitStoreError, ValueError):
    """What would be stored of a shard is further from the target's distributions than the budget allows."""


class StorageError(LogitStoreError, OSError):
    """The URL cannot be read or written: no such bucket, no network, a service that answers with errors."""


class StorageRefusedError(StorageError, PermissionError):
    """The disk is full, the credentials are missing or no longer valid, or the permission is: no use in more tries."""


class MissingDriverError(LogitStoreError, ImportError):
    """No installed package can open this kind of URL."""
