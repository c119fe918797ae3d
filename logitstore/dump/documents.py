"""Records and a tokenizer -> documents with loss masks -> the `tokens` layer of a store. No model, no Ray.

Row i of a document holds token i, and its mask says whether the prediction made there, of token i + 1, counts.
What records are is in sources.py, how one becomes documents in encoding.py. D documents, S shards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import tempfile
import time
import uuid
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute
from tqdm import tqdm

from logitstore import commits, writer
from logitstore.appends import claim, drop_claim, read_appends, write_append
from logitstore.attributes import read_attributes, stored_spec
from logitstore.causal_lm import tokenizer_spec
from logitstore.dump.encoding import COLUMNS, Encoder, Kind, choose_columns
from logitstore.dump.sources import find_source, open_records
from logitstore.errors import IdentityError, LayerNotFoundError
from logitstore.reader import Store
from logitstore.spec import ROW_CHUNK, Append, DataSpec, StoreSpec, check_same

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from logitstore.storage import Storage

logger = logging.getLogger(__name__)

BATCH = 256
"""Records tokenised at once."""

FEATURES = {"ids": datasets.List(datasets.Value("int32")), "mask": datasets.List(datasets.Value("uint8"))}


def assign_shards(lengths: NDArray[np.int64], shard_rows: int) -> NDArray[np.int64]:
    """Assigns documents to shards: whole, in order, as many to each as fit.

    Args:
        lengths: [D], none above shard_rows.
        shard_rows: Most rows of a shard.

    Returns:
        [S + 1]: shard s holds documents bounds[s]..bounds[s + 1].
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    bounds = [0]
    while bounds[-1] < len(lengths):
        first_row = int(ends[bounds[-1] - 1]) if bounds[-1] else 0
        bounds.append(int(np.searchsorted(ends, first_row + shard_rows, side="right")))
    return np.array(bounds, dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class Documents:
    """All documents, in a table on disk."""

    table: pa.Table
    """Columns ids and mask, lists."""
    lengths: NDArray[np.int64]
    """[D]: tokens of each; 0 for a dropped one."""

    def shard(self, first: int, stop: int) -> dict[str, NDArray[Any]]:
        """Returns documents first..stop as the arrays of a shard of `tokens`."""
        lengths = self.lengths[first:stop]
        return {
            "ids": self._values("ids", first, stop).view(np.uint32),
            "loss_mask": self._values("mask", first, stop),
            "lengths": lengths[lengths > 0].astype(np.uint32),
        }

    def _values(self, column: str, first: int, stop: int) -> NDArray[Any]:
        chunks = self.table.column(column).slice(first, stop - first).chunks
        return np.concatenate([chunk.flatten().to_numpy(zero_copy_only=True) for chunk in chunks])


def tokenize(dataset: datasets.Dataset, encoder: Encoder, num_proc: int, folder: Path) -> Documents:
    """Tokenises all records into a table in a folder.

    Raises:
        ValueError: A record is malformed, or no document is left.
    """
    num_proc = min(num_proc, -(-len(dataset) // BATCH))
    # The folder is fresh, so no result of another tokenizer or version is found in it; a fingerprint of our own spares
    # datasets from computing one by pickling the tokenizer.
    mapped = dataset.map(
        encoder,
        batched=True,
        batch_size=BATCH,
        with_indices=True,
        num_proc=num_proc if num_proc > 1 else None,
        remove_columns=dataset.column_names,
        features=datasets.Features({**FEATURES, "unlocated": datasets.Value("int32")}),
        cache_file_name=str(folder / "documents.arrow"),
        new_fingerprint=uuid.uuid4().hex,
        desc="Tokenising",
    )
    table = mapped.data.table
    lengths = pyarrow.compute.list_value_length(table.column("ids")).to_numpy().astype(np.int64)
    unlocated = pyarrow.compute.sum(table.column("unlocated")).as_py() or 0
    dropped = int((lengths == 0).sum())
    name = encoder.records.source.name
    if dropped == len(lengths):
        if encoder.kind == "messages":
            raise ValueError(
                f"messages must yield at least one response token, got none in data={name} ({unlocated} assistant "
                "turns not found in the chat template's text); give assistant messages after a user's, or a tokenizer "
                "whose chat template has {% generation %} around them"
            )
        raise ValueError(
            f"data must hold at least one document of 2 tokens of which one counts, got data={name} with none; "
            "check the columns and the loss mask"
        )
    if unlocated:
        logger.warning("%s: %d assistant turns are not found in the template's text, do not count", name, unlocated)
    if dropped:
        logger.warning("%s: dropped %d of %d windows, in which no prediction counts", name, dropped, len(lengths))
    return Documents(table=table, lengths=lengths)


def prepare(
    storage: Storage,
    data: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    shard_rows: int,
    num_proc: int,
    append: bool = False,
    storage_options: dict[str, Any] | None = None,
    progress: bool = True,
) -> Store:
    """Writes the `tokens` layer of a store, or what is missing of it, or adds documents to it.

    Args:
        storage: The store's root.
        data: Path or URL of JSONL, Parquet or text (a file, a folder, a glob), or hf:name[:split].
        tokenizer: With a chat template where the data are messages.
        max_length: Most tokens of a document; longer ones are split into windows.
        shard_rows: Most rows of a shard; above 2**14 rounded up to a multiple of it.
        num_proc: Processes that tokenise.
        append: Add the documents as new shards if the store does not hold these very ones.
        storage_options: What the data's file system needs. Never stored.
        progress: Show progress bars.

    Raises:
        ValueError: The data or an option is no good. Nothing has been written then.
        IdentityError: The store was made with another tokenizer, other options or, without `append`, other documents.
        LayerNotFoundError: Documents are to be appended to a store whose own are not all there.
        MissingDriverError: No installed package opens the data's URL.
    """
    if num_proc < 1:
        raise ValueError(f"num_proc must be at least 1, got num_proc={num_proc}")
    if shard_rows > ROW_CHUNK:
        shard_rows = -(-shard_rows // ROW_CHUNK) * ROW_CHUNK
    source = find_source(data, storage_options)

    def spec_of(columns: Kind, mask_policy: Literal["all", "response", "given"]) -> StoreSpec:
        return StoreSpec(
            tokenizer=tokenizer_spec(tokenizer, uses_chat_template=columns == "messages"),
            data=DataSpec(source=source.name, digest=source.digest, columns=columns, mask_policy=mask_policy),
            max_length=max_length,
            shard_rows=shard_rows,
            num_shards=0,
        )

    attributes = read_attributes(storage, "")
    stored = None if attributes is None else stored_spec(StoreSpec, attributes, "store")
    spec = spec_of("text", "all")  # refuses bad options before anything is read
    if stored is not None:
        spec = spec_of(stored.data.columns, stored.data.mask_policy)
        check_same(stored, spec, "store", writer.OTHER_STORE)
        if source.digest is not None:
            index = commits.read_index(storage, "tokens")
            for part in _parts(storage, stored):
                if part.data.digest == source.digest and all(shard in index for shard in part.shards):
                    return Store(storage)

    cache = Path(datasets.config.HF_DATASETS_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="logitstore-", dir=cache) as name, _progress_bars(progress):
        folder = Path(name)
        dataset, records, columns = open_records(source, folder, choose_columns)
        kind = next(kind for kind, needed in COLUMNS.items() if needed[0] == columns[0])
        if kind == "messages":
            _check_chat_tokenizer(tokenizer)
        responses = kind in ("messages", "prompt_response")
        spec = spec_of(kind, "response" if responses else "given" if "loss_mask" in columns else "all")
        if stored is not None:
            check_same(stored, spec, "store", writer.OTHER_STORE)
        encoder = Encoder(
            records=records,
            tokenizer=tokenizer,
            columns=columns,
            kind=kind,
            vocab_size=spec.tokenizer.vocab_size,
            max_length=max_length,
        )
        documents = tokenize(dataset, encoder, num_proc, folder)
        bounds = assign_shards(documents.lengths, shard_rows)
        described = dataclasses.replace(spec.data, documents=_identity(documents, bounds))
        spec = dataclasses.replace(spec, data=described, num_shards=len(bounds) - 1)
        if stored is None:
            writer.create_store(storage, spec)
            stored = spec
        same = next((part for part in _parts(storage, stored) if part.data.documents == spec.data.documents), None)
        if same is not None:
            _write(storage, same.first_shard, documents, bounds, progress)
        elif append:
            _append(storage, stored, spec, documents, bounds, progress)
        else:
            raise IdentityError(
                f"documents must be {_short(stored.data.documents)} as in the store, got "
                f"{_short(spec.data.documents)} from data={source.name}; give --append to add them, or another --store"
            )
    return Store(storage)


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Documents that came into a store together."""

    data: DataSpec
    first_shard: int
    num_shards: int

    @property
    def shards(self) -> range:
        return range(self.first_shard, self.first_shard + self.num_shards)


def _parts(storage: Storage, stored: StoreSpec) -> list[_Part]:
    """Lists what the store began with, and what was appended since."""
    appended = read_appends(storage, stored)
    return [
        _Part(data=stored.data, first_shard=0, num_shards=stored.num_shards),
        *(_Part(data=a.data, first_shard=a.first_shard, num_shards=a.num_shards) for a in appended),
    ]


def _identity(documents: Documents, bounds: NDArray[np.int64]) -> str:
    sha = hashlib.sha256()
    for first, stop in pairwise(bounds.tolist()):
        sha.update(commits.digest("tokens", documents.shard(first, stop)).encode())
    return f"sha256:{sha.hexdigest()}"


def _short(digest: str | None) -> str:
    return str(digest)[:19]


def _append(
    storage: Storage,
    stored: StoreSpec,
    spec: StoreSpec,
    documents: Documents,
    bounds: NDArray[np.int64],
    progress: bool,
) -> None:
    """Writes documents behind those that are there, and makes them all exist at once."""
    parts = _parts(storage, stored)
    index = commits.read_index(storage, "tokens")
    for part in parts:
        if missing := [shard for shard in part.shards if shard not in index]:
            raise LayerNotFoundError(
                f"tokens must be complete before others are appended, got {len(missing)} shards of "
                f"{part.data.source} missing in {storage.url}; give --data {part.data.source} to finish them"
            )
    new = Append(data=spec.data, first_shard=parts[-1].shards.stop, num_shards=spec.num_shards)
    holder = claim(storage, len(parts), new)
    if holder.data.documents != new.data.documents:
        raise IdentityError(
            f"append must be of {holder.data.source} ({_short(holder.data.documents)}), which is under way or was left "
            f"unfinished, got {spec.data.source} ({_short(new.data.documents)}); finish that one with its --data and "
            "--append, or give it up with `logitstore verify --repair`"
        )
    _write(storage, new.first_shard, documents, bounds, progress)
    _check_appended(storage, new.first_shard, documents, bounds)
    grown = dataclasses.replace(spec, num_shards=new.first_shard + new.num_shards)
    writer.make_room(storage, grown, "tokens")
    if not write_append(storage, len(parts), new):
        found = _parts(storage, stored)[len(parts)]
        if found.data.documents != new.data.documents:
            raise IdentityError(
                f"append {len(parts)} must be of {spec.data.source}, got {found.data.source} from another job; run the "
                "same command again"
            )
    drop_claim(storage, len(parts))


def _check_appended(storage: Storage, first_shard: int, documents: Documents, bounds: NDArray[np.int64]) -> None:
    """Checks that what was there already is of these documents too, before it becomes part of the store."""
    index = commits.read_index(storage, "tokens")
    for shard, span in enumerate(pairwise(bounds.tolist()), first_shard):
        wanted = commits.identity(commits.digest("tokens", documents.shard(*span)))
        found = None if (place := index.find(shard)) is None else bytes(index.digests[place]).decode()
        if found != wanted:
            raise IdentityError(
                f"tokens of shard {shard} must be {wanted} to be appended, got {found} from another job; give that "
                "append up with `logitstore verify --repair`, then run the same command again"
            )


def _write(
    storage: Storage, first_shard: int, documents: Documents, bounds: NDArray[np.int64], progress: bool
) -> None:
    """Writes those shards of the documents that are missing, from a shard on."""
    spans = list(enumerate(pairwise(bounds.tolist()), first_shard))
    attributes = read_attributes(storage, "") or {}
    tokens = writer.LayerWriter(storage, stored_spec(StoreSpec, attributes, "store"), "tokens")
    index = commits.read_index(storage, "tokens")
    missing = [(shard, span) for shard, span in spans if shard not in index]
    for shard, span in tqdm(missing, desc="Writing tokens", unit="shard", disable=not progress):
        started = time.monotonic()
        arrays = documents.shard(*span)
        commit = tokens.write(
            shard,
            arrays,
            documents=len(arrays["lengths"]),
            rows=len(arrays["ids"]),
            counted=int(arrays["loss_mask"].sum(dtype=np.int64)),
            computed_from=None,
            started=started,
        )
        if commit.digest != (digest := commits.digest("tokens", arrays)):
            raise IdentityError(
                f"tokens of shard {shard} must be {_short(digest)}, got {_short(commit.digest)} from another job; give "
                "another --store, or take the shard back with `logitstore verify --repair`"
            )


def _check_chat_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        raise ValueError(
            f"tokenizer must have a chat template for data with messages, got tokenizer={tokenizer.name_or_path} "
            "without; give --tokenizer of an instruction-tuned model, or data with prompt and response"
        )
    if not tokenizer.is_fast:
        raise ValueError(
            f"tokenizer must be a fast one for data with messages, got tokenizer={tokenizer.name_or_path} "
            f"({type(tokenizer).__name__}); only those tell which characters a token stands for"
        )


@contextlib.contextmanager
def _progress_bars(progress: bool) -> Iterator[None]:
    """Turns datasets' own progress bars off for a while, unless they are wanted."""
    if progress or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def preview(store: Store, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int = 80) -> str:
    """Shows the first document, tokens whose prediction counts between « and », so that people can check the mask."""
    document = store.shard(0, layers=("tokens",)).document(0)
    counted = np.concatenate([[False], document.loss_mask[:-1]])
    first = max(0, int(counted.argmax()) - max_tokens // 2)
    stop = min(len(counted), first + max_tokens)
    borders = [first, *(np.flatnonzero(np.diff(counted[first:stop])) + first + 1).tolist(), stop]
    runs = [
        ("«{}»" if counted[i] else "{}").format(tokenizer.decode(document.ids[i:j].tolist()))
        for i, j in pairwise(borders)
    ]
    text = ("… " if first else "") + "".join(runs) + (" …" if stop < len(counted) else "")
    return f"document 0, {int(counted.sum())} of {len(counted)} tokens count: {text}"
