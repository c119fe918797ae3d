"""logitstore: an offline cache of next-token distributions for training speculative-decoding drafts.

Reading a store needs only NumPy, zarr and fsspec. This package does not import torch, ray or transformers.
"""

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
