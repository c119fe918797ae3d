"""logitstore: an offline cache of next-token distributions for training speculative-decoding drafts.

Reading a store needs only NumPy, zarr and fsspec. This package does not import torch, ray or transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from logitstore.errors import DamagedShardError, IdentityError, LayerNotFoundError, LogitStoreError
    from logitstore.format.spec import StoreSpec
    from logitstore.inspection.verify import verify
    from logitstore.rows.rows import Rows
    from logitstore.rows.shard import Document, Shard
    from logitstore.store.reader import Store, open

__all__ = [
    "DamagedShardError",
    "Document",
    "IdentityError",
    "LayerNotFoundError",
    "LogitStoreError",
    "Rows",
    "Shard",
    "Store",
    "StoreSpec",
    "open",
    "verify",
]

_MODULES = {
    "DamagedShardError": "errors",
    "Document": "rows.shard",
    "IdentityError": "errors",
    "LayerNotFoundError": "errors",
    "LogitStoreError": "errors",
    "Rows": "rows.rows",
    "Shard": "rows.shard",
    "Store": "store.reader",
    "StoreSpec": "format.spec",
    "open": "store.reader",
    "verify": "inspection.verify",
}


def __getattr__(name: str) -> object:
    # Names are imported when they are first used. A command thus starts at once, and answers Ctrl-C from its start.
    if name not in _MODULES:
        raise AttributeError(f"module 'logitstore' has no attribute {name!r}")
    return getattr(import_module(f"logitstore.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
