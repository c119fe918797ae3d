"""Documents -> the arrays of a `tokens` shard as they are stored. Pure functions over NumPy arrays, no I/O.

R rows, D documents.
"""

from __future__ import annotations

import hashlib
import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

DIGEST_BYTES = 8
"""Of a SHA-256: among a billion documents two share a digest by chance with a probability of 3 %."""


def encode_tokens(ids: NDArray[Any], loss_mask: NDArray[Any], lengths: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Returns the arrays of a `tokens` shard (docs/format.md).

    Args:
        ids: [R]: tokens of the documents, end to end.
        loss_mask: [R], 0 or 1.
        lengths: [D], which add up to R.
    """
    ids = ids.astype(np.uint32, copy=False)
    loss_mask = loss_mask.astype(np.uint8, copy=False)
    lengths = lengths.astype(np.uint32, copy=False)
    digests = document_digests(ids, loss_mask, lengths)
    return {"ids": ids, "loss_mask": loss_mask, "lengths": lengths, "digests": digests}


def document_digests(
    ids: NDArray[np.uint32], loss_mask: NDArray[np.uint8], lengths: NDArray[np.uint32]
) -> NDArray[np.uint64]:
    """Returns the identity of each document: of its ids and its loss mask, wherever it stands.

    Args:
        ids: [R]
        loss_mask: [R]
        lengths: [D]. Where they do not add up to R, documents are what is there of them.

    Returns:
        Uint64 [D].
    """
    # Bytes, not arrays: slices of them cost a tenth, and there may be 100,000 documents of a few tokens.
    ids_bytes = memoryview(np.ascontiguousarray(ids, dtype="<u4").tobytes())
    mask_bytes = memoryview(np.ascontiguousarray(loss_mask, dtype="|u1").tobytes())
    ends = np.cumsum(lengths, dtype=np.int64).tolist()
    found = []
    for start, stop in itertools.pairwise([0, *ends]):
        sha = hashlib.sha256(ids_bytes[4 * start : 4 * stop])
        sha.update(mask_bytes[start:stop])
        found.append(sha.digest()[:DIGEST_BYTES])
    return np.frombuffer(b"".join(found), dtype="<u8")
