"""The documents of a store: those that it began with, and those that were added. No tokenizer, no model, no Ray.

Documents come in parts, each of shards of its own, and a part is known by its identity: what its shards hold, in their
order. Of several jobs that write the same part at once each does what is left; of those that would add different ones
one goes first, by a claim (appends.py). S shards.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from tqdm import tqdm

from logitstore.errors import IdentityError, LayerNotFoundError
from logitstore.format.commit import layer_digest, short_digest
from logitstore.format.spec import Append, DataSpec, StoreSpec, check_same
from logitstore.store import writer
from logitstore.store.catalog import read_attributes, stored_spec
from logitstore.store.commits.appends import claim, drop_claim, read_appends, write_append
from logitstore.store.commits.index import read_index

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from logitstore.storage.storage import Storage


class Shards(Protocol):
    """Documents, in the shards that they fill."""

    @property
    def num_shards(self) -> int:
        """How many there are."""

    def shard(self, number: int) -> dict[str, NDArray[Any]]:
        """Returns one of them, from 0, as the arrays of a shard of `tokens`."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Documents that came into a store together."""

    data: DataSpec
    first_shard: int
    num_shards: int

    @property
    def shards(self) -> range:
        """Those that they fill."""
        return range(self.first_shard, self.first_shard + self.num_shards)


def read_parts(storage: Storage, stored: StoreSpec) -> list[Part]:
    """Lists what the store began with, and what was appended since."""
    appended = read_appends(storage, stored)
    return [
        Part(data=stored.data, first_shard=0, num_shards=stored.num_shards),
        *(Part(data=a.data, first_shard=a.first_shard, num_shards=a.num_shards) for a in appended),
    ]


def write_part(storage: Storage, spec: StoreSpec, documents: Shards, *, append: bool, progress: bool = False) -> None:
    """Writes documents into a store, or what is missing of them where it has these very ones.

    Args:
        storage: The store's root.
        spec: Of a store of these documents alone. What they are, and how many shards, is filled in.
        documents: All of them.
        append: Add them if the store has others.
        progress: Show a progress bar.

    Raises:
        IdentityError: The store has others, and is not to be appended to, or is being appended to by others.
        LayerNotFoundError: Documents are to be appended to a store whose own are not all there.
    """
    digests = [layer_digest("tokens", documents.shard(number)) for number in range(documents.num_shards)]
    sha = hashlib.sha256("".join(digests).encode())
    own = dataclasses.replace(spec.data, documents=f"sha256:{sha.hexdigest()}")
    spec = dataclasses.replace(spec, data=own, num_shards=len(digests))
    if (attributes := read_attributes(storage, "")) is None:
        writer.create_store(storage, spec)
        stored = spec
    else:
        stored = stored_spec(StoreSpec, attributes, "store")
        check_same(stored, spec, "store", writer.OTHER_STORE)
    writing = _Writing(storage=storage, stored=stored, own=own, documents=documents, digests=digests, progress=progress)
    appended = False
    while True:  # each time around, either this job or another has appended something
        parts = writing.parts()
        if (part := next((part for part in parts if part.data.documents == own.documents), None)) is not None:
            break
        if not append:
            raise IdentityError(
                f"documents must be {_short(stored.data.documents)} as in the store, got {_short(own.documents)} "
                f"from data={own.source}; give --append to add them, or another --store"
            )
        writing.append(parts)
        appended = True
    writing.write(part.first_shard)
    if appended:
        writing.make_room()


@dataclass(frozen=True, kw_only=True)
class _Writing:
    """Documents on their way into a store."""

    storage: Storage
    stored: StoreSpec
    """As the root has it: without what was appended."""
    own: DataSpec
    documents: Shards
    digests: Sequence[str]
    """[S], of each shard."""
    progress: bool

    def parts(self) -> list[Part]:
        return read_parts(self.storage, self.stored)

    def append(self, parts: Sequence[Part]) -> None:
        """Writes the documents behind those that are there, and makes them all exist at once.

        Or does nothing, where some were appended meanwhile: these may be among them.

        Args:
            parts: What is there, without these documents.
        """
        self._check_complete(parts)
        number, end = len(parts), parts[-1].shards.stop
        new = Append(data=self.own, first_shard=end, num_shards=len(self.digests))
        holder = claim(self.storage, number, new)
        # Who has published drops his claim: that of a number that is over can be had again, and means nothing.
        if len(self.parts()) > number:
            drop_claim(self.storage, number)
            return
        if holder is None:
            raise IdentityError(
                f"append {number} must be claimed while its documents are written, got a claim that was given up just "
                "now; run the same command again"
            )
        if holder.data.documents != self.own.documents:
            raise IdentityError(
                f"append must be of {holder.data.source} ({_short(holder.data.documents)}), which is under way or was "
                f"left unfinished, got {self.own.source} ({_short(self.own.documents)}); finish that one with its "
                "--data and --append, or give it up with `logitstore verify --repair`"
            )
        # Before anything is written beside what may be others', and before it becomes part of the store.
        if not self._check_behind(number, end):
            return
        self.write(end)
        if not self._check_behind(number, end, complete=True):
            return
        self.make_room(new)
        write_append(self.storage, number, new)
        drop_claim(self.storage, number)

    def write(self, first_shard: int) -> None:
        """Writes those shards of the documents that are missing, from a shard on."""
        attributes = read_attributes(self.storage, "") or {}
        tokens = writer.LayerWriter(self.storage, stored_spec(StoreSpec, attributes, "store"), "tokens")
        index = read_index(self.storage, "tokens")
        missing = [number for number in range(len(self.digests)) if first_shard + number not in index]
        for number in tqdm(missing, desc="Writing tokens", unit="shard", disable=not self.progress):
            started = time.monotonic()
            arrays = self.documents.shard(number)
            commit = tokens.write(
                first_shard + number,
                arrays,
                documents=len(arrays["lengths"]),
                rows=len(arrays["ids"]),
                counted=int(arrays["loss_mask"].sum(dtype="int64")),
                computed_from=None,
                started=started,
            )
            if commit.digest != (digest := self.digests[number]):
                raise IdentityError(
                    f"tokens of shard {commit.shard} must be {_short(digest)}, got {_short(commit.digest)} from "
                    "another job; give another --store, or take the shard back with `logitstore verify --repair`"
                )

    def make_room(self, new: Append | None = None) -> None:
        """Makes the arrays cover all documents, and those of an append.

        Again once it is published, as a late writer of an earlier append may have put back smaller ones.
        """
        end = self.parts()[-1].shards.stop if new is None else new.first_shard + new.num_shards
        writer.make_room(self.storage, dataclasses.replace(self.stored, num_shards=end), "tokens")

    def _check_complete(self, parts: Sequence[Part]) -> None:
        index = read_index(self.storage, "tokens")
        for part in parts:
            if missing := [shard for shard in part.shards if shard not in index]:
                raise LayerNotFoundError(
                    f"tokens must be complete before others are appended, got {len(missing)} shards of "
                    f"{part.data.source} missing in {self.storage.url}; give --data {part.data.source} to finish them"
                )

    def _check_behind(self, number: int, end: int, *, complete: bool = False) -> bool:
        """Checks that what is behind the store's end is of these documents.

        Args:
            number: Of the append.
            end: Where the store ends without it.
            complete: Whether all of them must be there.

        Returns:
            False if this append, or another of its number, was published meanwhile.
        """
        index = read_index(self.storage, "tokens")
        wanted = dict(enumerate(map(short_digest, self.digests), end))
        there = index.shards[len(index.upto(end)) :].tolist()
        for shard in sorted({*there, *(wanted if complete else ())}):
            place = index.find(shard)
            found = "none" if place is None else bytes(index.digests[place]).decode()
            if found == wanted.get(shard) and shard not in index.contested:
                continue
            if len(self.parts()) > number:
                return False
            raise IdentityError(
                f"tokens of shard {shard} must be {wanted.get(shard, 'none')} to be appended, got {found} from another "
                "job; if a file in appends/ is gone, restore it, else give that append up with `logitstore verify "
                "--repair`; then run the same command again"
            )
        return True


def _short(digest: str | None) -> str:
    return str(digest)[:19]
