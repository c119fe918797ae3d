"""Writes documents into a new store, or appends them to an existing store. Uses no tokenizer, no model and no Ray.

The documents of a store form parts. The first part holds the documents that the store was created with, and each append
adds one part. Each part has its own shards. The identity of a part is a digest of the contents of its shards, in order.
Several jobs may write the same part at once: each writes the shards that are missing. A job claims an append before it
writes (appends.py). If several jobs append different documents at once, the job that creates the claim continues, and
the other jobs raise IdentityError.

S: number of shards in a part.
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
    """Documents that are divided into shards."""

    @property
    def num_shards(self) -> int:
        """Number of shards."""

    def shard(self, number: int) -> dict[str, NDArray[Any]]:
        """Returns the `tokens` arrays of one shard, keyed by name. Shards are numbered from 0."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Documents that were written into a store together."""

    data: DataSpec
    """Source and identity of the documents."""
    first_shard: int
    """Number that the first shard of the part has in the store."""
    num_shards: int
    """Number of shards in the part."""

    @property
    def shards(self) -> range:
        """Numbers that the shards of the part have in the store."""
        return range(self.first_shard, self.first_shard + self.num_shards)


def read_parts(storage: Storage, stored: StoreSpec) -> list[Part]:
    """Lists the parts of a store: the documents that it began with, then the appends in order.

    Args:
        storage: Root of the store.
        stored: Spec of the store, read from the attributes of its root. This spec does not list the appends.

    Raises:
        FormatError: A file that describes an append is malformed.
    """
    appended = read_appends(storage, stored)
    return [
        Part(data=stored.data, first_shard=0, num_shards=stored.num_shards),
        *(Part(data=a.data, first_shard=a.first_shard, num_shards=a.num_shards) for a in appended),
    ]


def write_part(storage: Storage, spec: StoreSpec, documents: Shards, *, append: bool, progress: bool = False) -> None:
    """Writes documents into a store as one part. If the store has this part already, writes only its missing shards.

    Args:
        storage: Root of the store, which is created if it does not exist.
        spec: Spec for a store that would hold only these documents. This function fills in the identity of the
            documents and the number of shards.
        documents: All documents of the part.
        append: Whether to append the documents if the store has other documents.
        progress: Whether to show a progress bar.

    Raises:
        IdentityError: The store was made with other options, or it has other documents and `append` is False, or
            another job is appending other documents.
        LayerNotFoundError: The documents must be appended, but shards of an earlier part are missing.
    """
    # The identity of the part must be known before its first shard is written.
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
    # Each complete pass of this loop ends after this job or another job has published an append. The parts are then
    # read again, because the append of another job may hold these documents.
    while True:
        parts = writing.parts()
        if (part := next((part for part in parts if part.data.documents == own.documents), None)) is not None:
            break
        if not append:
            raise IdentityError(
                f"data must hold the same documents as the store ({_short(stored.data.documents)}), got "
                f"data={own.source} with others ({_short(own.documents)}); give --append to add them, or another "
                "--store"
            )
        writing.append(parts)
        appended = True
    writing.write(part.first_shard)
    if appended:
        writing.make_room()


@dataclass(frozen=True, kw_only=True)
class _Writing:
    """State of one call of `write_part`: the store, and the documents that the call writes."""

    storage: Storage
    stored: StoreSpec
    """Spec of the store, read from the attributes of its root. This spec does not list the appends."""
    own: DataSpec
    """Source and identity of the documents."""
    documents: Shards
    digests: Sequence[str]
    """[S]: digest of each shard."""
    progress: bool

    def parts(self) -> list[Part]:
        return read_parts(self.storage, self.stored)

    def append(self, parts: Sequence[Part]) -> None:
        """Writes the documents after the store's last shard, then publishes all of them at once.

        Returns without publishing if another job published an append in the meantime. The caller must then read the
        parts again, since that append may hold these documents.

        Args:
            parts: Parts of the store, none of which holds these documents.

        Raises:
            IdentityError: Another job has claimed this append for other documents, or has written shards of other
                documents after the store's end.
            LayerNotFoundError: Shards of an earlier part are missing.
        """
        self._check_complete(parts)
        number, end = len(parts), parts[-1].shards.stop
        new = Append(data=self.own, first_shard=end, num_shards=len(self.digests))
        holder = claim(self.storage, number, new)
        # If another job has just published this append and removed its claim, the call above has created a claim for a
        # number that is already published. That claim has no meaning and is removed.
        if len(self.parts()) > number:
            drop_claim(self.storage, number)
            return
        if holder is None:
            raise IdentityError(
                f"another process has just removed the claim of append {number}, which this process was about to "
                "write; run the same command again"
            )
        if holder.data.documents != self.own.documents:
            raise IdentityError(
                f"an append of {holder.data.source} ({_short(holder.data.documents)}) is running or was left "
                f"unfinished, so {self.own.source} ({_short(self.own.documents)}) cannot be appended now; finish the "
                f"other append with --data {holder.data.source} --append, or discard it: `logitstore verify --repair`"
            )
        # Shards after the store's end are checked twice. The first check comes before this job writes, because another
        # job may have written some of them. The second check comes before all of them become part of the store.
        if not self._check_behind(number, end):
            return
        self.write(end)
        if not self._check_behind(number, end, complete=True):
            return
        self.make_room(new)
        write_append(self.storage, number, new)
        drop_claim(self.storage, number)

    def write(self, first_shard: int) -> None:
        """Writes those shards of the part that are not committed yet.

        Args:
            first_shard: Number that the first shard of the part has in the store.

        Raises:
            IdentityError: Another job has committed one of these shards with other documents.
        """
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
            # If another job has committed the shard first, `commit` is the commit of that job.
            if commit.digest != (digest := self.digests[number]):
                raise IdentityError(
                    f"shard {commit.shard} must hold tokens with digest {_short(digest)}, got {_short(commit.digest)}, "
                    "which another job wrote; give another --store, or remove the shard by `logitstore verify --repair`"
                )

    def make_room(self, new: Append | None = None) -> None:
        """Enlarges the array shapes in the Zarr metadata to cover all parts.

        This method is called before an append is published, and once more afterwards. The second call is needed because
        a slow job that writes an earlier append may have restored smaller shapes in between.

        Args:
            new: Append that is about to be published and must be covered too; None if all appends are published.
        """
        end = self.parts()[-1].shards.stop if new is None else new.first_shard + new.num_shards
        writer.make_room(self.storage, dataclasses.replace(self.stored, num_shards=end), "tokens")

    def _check_complete(self, parts: Sequence[Part]) -> None:
        """Raises LayerNotFoundError if a shard of one of the parts is not committed."""
        index = read_index(self.storage, "tokens")
        for part in parts:
            if missing := [shard for shard in part.shards if shard not in index]:
                raise LayerNotFoundError(
                    f"tokens must be complete before documents are appended, got {len(missing)} shards of "
                    f"{part.data.source} missing in {self.storage.url}; give --data {part.data.source} to finish them"
                )

    def _check_behind(self, number: int, end: int, *, complete: bool = False) -> bool:
        """Checks that all committed shards after the store's last one belong to these documents.

        Args:
            number: Number of the append.
            end: Number of shards in the store without the append.
            complete: Whether all shards of these documents must be committed.

        Returns:
            True if the shards belong to these documents. False if an append of this number, by this or another job, was
            published in the meantime.

        Raises:
            IdentityError: A shard holds other documents, has several commits, or is missing although `complete` is set.
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
                f"shard {shard} after the end of the store must hold the tokens of these documents (digest "
                f"{wanted.get(shard, 'none')}), got digest {found} from another job. If a file in appends/ is missing, "
                "restore it. Otherwise, discard the unfinished append with `logitstore verify --repair`. Then run the "
                "same command again"
            )
        return True


def _short(digest: str | None) -> str:
    """Returns the beginning of a digest, for messages: "sha256:" and 12 hexadecimal digits."""
    return str(digest)[:19]
