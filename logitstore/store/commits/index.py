"""The commit records of a layer, as one listing shows them."""

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
    """The committed shards of a layer, by number, as one listing of their records tells them.

    S shards, of 72 bytes each.
    """

    layer: str
    shards: NDArray[np.int64]
    """[S], ascending."""
    documents: NDArray[np.int64]
    rows: NDArray[np.int64]
    counted: NDArray[np.int64]
    entries: NDArray[np.int64]
    set_aside: NDArray[np.int64]
    """[S] each: the counts of the same name in a commit; documents set aside."""
    digests: NDArray[np.bytes_]
    """[S]: first digits of each shard's digest."""
    origins: NDArray[np.bytes_]
    """[S]: first digits of the digest that it was computed from."""
    contested: frozenset[int]
    """Shards with more than one record: none of them can be trusted, and all appear above once."""
    unknown: tuple[str, ...]
    """Names that are not those of records. They mean nothing."""

    def __len__(self) -> int:
        return len(self.shards)

    def __contains__(self, shard: int) -> bool:
        return self.find(shard) is not None

    def find(self, shard: int) -> int | None:
        """Returns the place of a shard in the arrays, None if it is not committed."""
        place = int(np.searchsorted(self.shards, shard))
        return place if place < len(self.shards) and self.shards[place] == shard else None

    def name(self, place: int) -> str:
        """Returns the name of the record at a place in the arrays."""
        columns = (self.shards, self.documents, self.rows, self.counted, self.entries, self.set_aside)
        digest, origin = bytes(self.digests[place]).decode(), bytes(self.origins[place]).decode()
        return record_name(*(int(column[place]) for column in columns), digest=digest, origin=origin)

    @cached_property
    def committed(self) -> frozenset[int]:
        """The shards as a set."""
        return frozenset(self.shards.tolist())

    def upto(self, num_shards: int) -> Index:
        """Returns the part of it below a shard."""
        stop = int(np.searchsorted(self.shards, num_shards))
        if stop == len(self.shards):
            return self
        parts = {name: getattr(self, name)[:stop] for name in _COLUMNS}
        return dataclasses.replace(self, **parts, contested=frozenset(s for s in self.contested if s < num_shards))


_HEAD = -len(f"-{NO_DIGEST}-{NO_DIGEST}.json")
_DIGESTS = (
    slice(_HEAD + 1, _HEAD + 1 + SHORT_DIGEST_LENGTH),
    slice(_HEAD + 2 + SHORT_DIGEST_LENGTH, _HEAD + 2 + 2 * SHORT_DIGEST_LENGTH),
)
"""Where the counts of a name end, and where its digests are: all are of the same length there."""
_COLUMNS = ("shards", "documents", "rows", "counted", "entries", "set_aside", "digests", "origins")


def commits_folder(layer: str) -> str:
    """Returns where the records of a layer are."""
    return f"commits/{layer}"


def read_index(storage: Storage, layer: str) -> Index:
    """Lists the committed shards of a layer."""
    return index_from_names(layer, storage.names(commits_folder(layer)))


def index_from_names(layer: str, names: Sequence[str]) -> Index:
    """Reads what the names of records, in order, say. Some 100,000 of them are to take a tenth of a second."""
    records = [name for name in names if RECORD_NAME.fullmatch(name)]
    heads = "-".join([name[:_HEAD] for name in records]).encode()
    numbers = np.fromstring(heads.translate(None, b"drces"), dtype=np.int64, sep="-").reshape(-1, 6)
    digests, origins = (
        np.array([name[part] for name in records], dtype=f"S{SHORT_DIGEST_LENGTH}") for part in _DIGESTS
    )
    order = np.argsort(numbers[:, 0], kind="stable")
    shards = numbers[order, 0]
    is_last = np.append(shards[1:] != shards[:-1], True)[: len(shards)]
    kept = order[is_last]
    return Index(
        layer=layer,
        **dict(zip(_COLUMNS, [*numbers[kept].T.copy(), digests[kept], origins[kept]], strict=True)),
        contested=frozenset(shards[~is_last].tolist()),
        unknown=tuple(name for name in names if not RECORD_NAME.fullmatch(name)) if len(records) < len(names) else (),
    )


def commit_names(storage: Storage, layer: str, shard: int) -> list[str]:
    """Lists the records of a shard: one if it is committed."""
    return [name for name in storage.names_with(commits_folder(layer), f"{shard:06d}-") if RECORD_NAME.fullmatch(name)]


def find_commit(storage: Storage, layer: str, shard: int) -> Commit | None:
    """Reads the record of a shard as it is now; None if it is not committed.

    Raises:
        DamagedShardError: There are several, or the record is not what its name says.
    """
    names = commit_names(storage, layer, shard)
    if not names:
        return None
    if len(names) > 1:
        raise DamagedShardError(layer, shard, f"{len(names)} commit records")
    try:
        data = storage.get(f"{commits_folder(layer)}/{names[0]}")
    except FileNotFoundError:  # taken back since it was listed
        return None
    except FormatError as error:
        raise DamagedShardError(layer, shard, "a commit record too long to be one") from error
    return parse_commit(data, layer, shard, names[0])
