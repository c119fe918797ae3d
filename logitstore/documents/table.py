"""Tokenises documents into one Arrow table on disk, in order, and divides them into shards.

D: number of documents. S: number of shards.
"""

from __future__ import annotations

import contextlib
import logging
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute

from logitstore.documents.columns import COLUMNS, choose_columns
from logitstore.documents.records import open_records
from logitstore.documents.tokenizing import Encoder
from logitstore.rows.tokens import encode_tokens

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from logitstore.documents.sources import Source


logger = logging.getLogger(__name__)

BATCH = 256
"""Number of records tokenised at once."""
FEATURES = {"ids": datasets.List(datasets.Value("int32")), "mask": datasets.List(datasets.Value("uint8"))}
"""Columns of the table of documents, which has one row for each document."""


def assign_shards(lengths: NDArray[np.int64], shard_rows: int) -> NDArray[np.int64]:
    """Assigns documents to shards in order. Each shard gets as many whole documents as fit.

    Args:
        lengths: [D]: number of tokens in each document, each at most `shard_rows`.
        shard_rows: Largest number of rows in a shard.

    Returns:
        Bounds [S + 1]: shard s holds the documents from bounds[s] up to, but not including, bounds[s + 1].
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    bounds = [0]
    while bounds[-1] < len(lengths):
        first_row = int(ends[bounds[-1] - 1]) if bounds[-1] else 0
        bounds.append(int(np.searchsorted(ends, first_row + shard_rows, side="right")))
    return np.array(bounds, dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class Documents:
    """All tokenised documents of a source, in a table on disk."""

    table: pa.Table
    """Table with one row for each document. Column `ids` holds a list of token ids, column `mask` a loss mask."""
    lengths: NDArray[np.int64]
    """[D]: number of tokens in each document; 0 for a document that was dropped because no prediction in it counts."""
    bounds: NDArray[np.int64]
    """[S + 1]: shard s holds the documents from bounds[s] up to, but not including, bounds[s + 1]."""

    _digests: dict[int, NDArray[np.uint64]] = field(default_factory=dict, repr=False)
    """Digests of the documents in each shard that was already encoded, keyed by the number of the shard."""

    @property
    def num_shards(self) -> int:
        """Number of shards that the documents fill."""
        return len(self.bounds) - 1

    def shard(self, number: int) -> dict[str, NDArray[Any]]:
        """Returns the `tokens` arrays of one shard, keyed by name. Shards are numbered from 0."""
        first, stop = self.bounds[number : number + 2].tolist()
        lengths = self.lengths[first:stop]
        ids, mask = self._values("ids", first, stop).view(np.uint32), self._values("mask", first, stop)
        arrays = encode_tokens(ids, mask, lengths[lengths > 0], self._digests.get(number))
        # A shard is encoded twice: to compute the identity of all documents, and to be written. Hashing the documents
        # is the slow part, so their digests are kept for the second time.
        self._digests[number] = arrays["digests"]
        return arrays

    def _values(self, column: str, first: int, stop: int) -> NDArray[Any]:
        chunks = self.table.column(column).slice(first, stop - first).chunks
        return np.concatenate([chunk.flatten().to_numpy(zero_copy_only=True) for chunk in chunks])


def tokenize(dataset: datasets.Dataset, encoder: Encoder, num_proc: int, folder: Path, shard_rows: int) -> Documents:
    """Tokenises all records into a table on disk. Logs how many documents and assistant turns are left out.

    Args:
        dataset: Table of the records.
        encoder: Turns the rows of that table into documents.
        num_proc: Largest number of processes to use.
        folder: Folder in which the table is created. It must exist for as long as the documents are used.
        shard_rows: Largest number of rows in a shard.

    Raises:
        ValueError: A record is malformed, or no record gives a document.
    """
    # More processes than batches would have nothing to do.
    num_proc = min(num_proc, -(-len(dataset) // BATCH))
    # The file is in a new folder, so that the datasets library cannot reuse the result of another tokenizer or version.
    # A fingerprint is given, because the library would otherwise pickle the tokenizer to compute one.
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
                "turns not found in the chat template's text); give assistant messages that follow a user message, or "
                "a tokenizer whose chat template has {% generation %} around them"
            )
        raise ValueError(
            f"data must hold a document of at least 2 tokens in which a prediction counts, got data={name} with none; "
            "check the columns and the loss mask"
        )
    if unlocated:
        logger.warning("%s: %d assistant turns were not found in the template's text and do not count", name, unlocated)
    if dropped:
        logger.warning("%s: dropped %d of %d windows because no prediction in them counts", name, dropped, len(lengths))
    return Documents(table=table, lengths=lengths, bounds=assign_shards(lengths, shard_rows))


def open_encoder(
    source: Source, folder: Path, tokenizer: PreTrainedTokenizerBase, vocab_size: int, max_length: int
) -> tuple[datasets.Dataset, Encoder]:
    """Opens the records of a source, and makes the encoder that turns them into documents.

    Args:
        source: Source of the records.
        folder: Folder in which file copies and tables are created. It must exist for as long as the records are used.
        tokenizer: The target's tokenizer.
        vocab_size: Size of the tokenizer's vocabulary.
        max_length: Largest number of tokens in a document, at least 2.

    Returns:
        Table of the records, and the encoder.

    Raises:
        ValueError: The records cannot be read or lack the needed columns, or the tokenizer lacks the chat template or
            the character offsets that messages need.
    """
    dataset, records, columns = open_records(source, folder, choose_columns)
    # The first column alone tells the kind, because no two kinds have the same first column.
    kind = next(kind for kind, needed in COLUMNS.items() if needed[0] == columns[0])
    if kind == "messages":
        _check_chat_tokenizer(tokenizer)
    encoder = Encoder(
        records=records, tokenizer=tokenizer, columns=columns, kind=kind, vocab_size=vocab_size, max_length=max_length
    )
    return dataset, encoder


def _check_chat_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        raise ValueError(
            f"tokenizer must have a chat template for data with messages, got tokenizer={tokenizer.name_or_path} "
            "without one; give --tokenizer of an instruction-tuned model, or data with prompt and response"
        )
    if not tokenizer.is_fast:
        raise ValueError(
            f"tokenizer must be a fast one for data with messages, got tokenizer={tokenizer.name_or_path} "
            f"({type(tokenizer).__name__}); only fast ones report which characters a token stands for"
        )


@contextlib.contextmanager
def progress_bars(progress: bool) -> Iterator[None]:
    """Context manager that hides the progress bars of the datasets library, unless `progress` is true.

    Args:
        progress: Whether to leave the bars on.
    """
    # Bars that were off before must stay off afterwards.
    if progress or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
