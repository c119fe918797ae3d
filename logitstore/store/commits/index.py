"""The index of a layer: its committed shards, parsed from the names of their commit records in one listing.

The name of a record holds its counts and the first digits of its digests, so the records themselves are not read.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from logitstore.errors import DamagedShardError, FormatError
from logitstore.format.commit import (
    NO_DIGEST,
    RECORD_NAME,
    SHORT_DIGEST_LENGTH,
    Commit,
    parse_commit,
    record_name,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from logitstore.storage.storage import Storage


@dataclass(frozen=True, kw_only=True)
class Index:
    """The committed shards of a layer, in ascending order, parsed from one listing of their records.

    In shapes, S is the number of committed shards. The index takes 72 bytes of memory per shard.
    """

    layer: str
    """Layer of the records."""
    shards: NDArray[np.int64]
    """[S]: shard numbers, in ascending order."""
    documents: NDArray[np.int64]
    """[S]: number of documents in each shard."""
    rows: NDArray[np.int64]
    """[S]: number of rows in each shard."""
    counted: NDArray[np.int64]
    """[S]: number of rows with loss mask 1 in each shard, excluding rows of documents that were set aside."""
    entries: NDArray[np.int64]
    """[S]: number of entries in each shard; 0 in layers without entries."""
    set_aside: NDArray[np.int64]
    """[S]: number of documents in each shard that were set aside because they could not be computed."""
    digests: NDArray[np.bytes_]
    """[S]: first hexadecimal digits of each shard's digest."""
    origins: NDArray[np.bytes_]
    """[S]: first hexadecimal digits of the digest of the values from which each shard was computed. These values were
    those of the same shard in the layer below. Zeros for tokens."""
    contested: frozenset[int]
    """Numbers of the shards with more than one record. None of these records can be trusted. Each such shard appears
    once in `shards`."""
    unknown: tuple[str, ...]
    """Names in the commits folder that are not names of records. Readers ignore them."""

    def __len__(self) -> int:
        return len(self.shards)

    def __contains__(self, shard: int) -> bool:
        return self.find(shard) is not None

    def find(self, shard: int) -> int | None:
        """Returns the place of a shard in the arrays; None if the shard is not committed."""
        place = int(np.searchsorted(self.shards, shard))
        return place if place < len(self.shards) and self.shards[place] == shard else None

    def name(self, place: int) -> str:
        """Returns the name of the record at a place in the arrays."""
        columns = (self.shards, self.documents, self.rows, self.counted, self.entries, self.set_aside)
        digest, origin = bytes(self.digests[place]).decode(), bytes(self.origins[place]).decode()
        return record_name(*(int(column[place]) for column in columns), digest=digest, origin=origin)

    @cached_property
    def committed(self) -> frozenset[int]:
        """Numbers of the committed shards, as a set."""
        return frozenset(self.shards.tolist())

    def upto(self, num_shards: int) -> Index:
        """Returns an index of only the shards with numbers below `num_shards`. The field `unknown` is unchanged."""
        stop = int(np.searchsorted(self.shards, num_shards))
        if stop == len(self.shards):
            return self
        parts = {name: getattr(self, name)[:stop] for name in _COLUMNS}
        return dataclasses.replace(self, **parts, contested=frozenset(s for s in self.contested if s < num_shards))


_HEAD = -len(f"-{NO_DIGEST}-{NO_DIGEST}.json")
"""Index at which the counts in a record's name end. The index is negative: it counts from the end of the name, because
only the part of the name after the counts has a fixed length."""
_DIGESTS = (
    slice(_HEAD + 1, _HEAD + 1 + SHORT_DIGEST_LENGTH),
    slice(_HEAD + 2 + SHORT_DIGEST_LENGTH, _HEAD + 2 + 2 * SHORT_DIGEST_LENGTH),
)
"""Slices of the two digests in a record's name. Both are counted from the end of the name."""
# The arrays of an `Index`, in the order in which a record's name holds their values.
_COLUMNS = ("shards", "documents", "rows", "counted", "entries", "set_aside", "digests", "origins")


def commits_folder(layer: str) -> str:
    """Returns the path of the folder that holds a layer's commit records."""
    return f"commits/{layer}"


def read_index(storage: Storage, layer: str) -> Index:
    """Lists the committed shards of a layer."""
    return index_from_names(layer, storage.names(commits_folder(layer)))


def index_from_names(layer: str, names: Sequence[str]) -> Index:
    """Parses the names of a layer's records into an index.

    Args:
        layer: The layer of the records.
        names: Sorted names in the layer's commits folder. Names that are not names of records are put in `unknown`.
    """
    records = [name for name in names if RECORD_NAME.fullmatch(name)]
    # 100,000 names should take 0.1 s, so one call of NumPy parses all the counts. "drces" are the letters that follow
    # the counts in a name.
    heads = "-".join([name[:_HEAD] for name in records]).encode()
    numbers = np.fromstring(heads.translate(None, b"drces"), dtype=np.int64, sep="-").reshape(-1, 6)
    digests, origins = (
        np.array([name[part] for name in records], dtype=f"S{SHORT_DIGEST_LENGTH}") for part in _DIGESTS
    )
    # Names are sorted as text, which puts shard 1000000 before shard 999999, so shards are sorted by number here.
    order = np.argsort(numbers[:, 0], kind="stable")
    shards = numbers[order, 0]
    # A shard with several records is contested. Its last record is used, so that each shard appears once in the index.
    is_last = np.append(shards[1:] != shards[:-1], True)[: len(shards)]
    kept = order[is_last]
    return Index(
        layer=layer,
        **dict(zip(_COLUMNS, [*numbers[kept].T.copy(), digests[kept], origins[kept]], strict=True)),
        contested=frozenset(shards[~is_last].tolist()),
        unknown=tuple(name for name in names if not RECORD_NAME.fullmatch(name)) if len(records) < len(names) else (),
    )


def commit_names(storage: Storage, layer: str, shard: int) -> list[str]:
    """Lists the names of a shard's records.

    A shard without a record is not committed, and a shard with several records is damaged. The call bypasses all caches
    of listings, so a writer can rely on the result.
    """
    return [name for name in storage.names_with(commits_folder(layer), f"{shard:06d}-") if RECORD_NAME.fullmatch(name)]


def find_commit(storage: Storage, layer: str, shard: int) -> Commit | None:
    """Reads the current record of a shard; None if the shard is not committed.

    Raises:
        DamagedShardError: The shard has several records, or a record that is malformed or does not match its file name.
    """
    names = commit_names(storage, layer, shard)
    if not names:
        return None
    if len(names) > 1:
        raise DamagedShardError(layer, shard, f"{len(names)} commit records")
    try:
        data = storage.get(f"{commits_folder(layer)}/{names[0]}")
    except FileNotFoundError:  # The shard was taken back after the listing.
        return None
    except FormatError as error:
        raise DamagedShardError(layer, shard, "a commit record that is too long") from error
    return parse_commit(data, layer, shard, names[0])
