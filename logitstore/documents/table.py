"""Documents as token ids and loss masks, in order, in one Arrow table."""

from __future__ import annotations

import contextlib
import logging
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute

from logitstore.documents.records import open_records
from logitstore.documents.tokenizing import COLUMNS, Encoder, choose_columns
from logitstore.rows.tokens import encode_tokens

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from logitstore.documents.sources import Source


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
    bounds: NDArray[np.int64]
    """[S + 1]: shard s holds documents bounds[s]..bounds[s + 1]."""

    @property
    def num_shards(self) -> int:
        """How many shards they fill."""
        return len(self.bounds) - 1

    def shard(self, number: int) -> dict[str, NDArray[Any]]:
        """Returns one of them, from 0, as the arrays of a shard of `tokens`."""
        first, stop = self.bounds[number : number + 2].tolist()
        lengths = self.lengths[first:stop]
        ids, mask = self._values("ids", first, stop).view(np.uint32), self._values("mask", first, stop)
        return encode_tokens(ids, mask, lengths[lengths > 0])

    def _values(self, column: str, first: int, stop: int) -> NDArray[Any]:
        chunks = self.table.column(column).slice(first, stop - first).chunks
        return np.concatenate([chunk.flatten().to_numpy(zero_copy_only=True) for chunk in chunks])


def tokenize(dataset: datasets.Dataset, encoder: Encoder, num_proc: int, folder: Path, shard_rows: int) -> Documents:
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
    return Documents(table=table, lengths=lengths, bounds=assign_shards(lengths, shard_rows))


def open_encoder(
    source: Source, folder: Path, tokenizer: PreTrainedTokenizerBase, vocab_size: int, max_length: int
) -> tuple[datasets.Dataset, Encoder]:
    """Makes a table of all records in a folder, and what turns them into documents.

    Raises:
        ValueError: The records cannot be read, or make no documents with this tokenizer.
    """
    dataset, records, columns = open_records(source, folder, choose_columns)
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
            "without; give --tokenizer of an instruction-tuned model, or data with prompt and response"
        )
    if not tokenizer.is_fast:
        raise ValueError(
            f"tokenizer must be a fast one for data with messages, got tokenizer={tokenizer.name_or_path} "
            f"({type(tokenizer).__name__}); only those tell which characters a token stands for"
        )


@contextlib.contextmanager
def progress_bars(progress: bool) -> Iterator[None]:
    """Turns datasets' own progress bars off for a while, unless they are wanted."""
    if progress or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
