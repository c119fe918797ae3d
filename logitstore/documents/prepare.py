"""Tokenises the records of `--data` and writes the `tokens` layer of a store. Uses no model and no Ray.

Row i of a document holds token i and predicts token i + 1. The loss mask of the row is 1 if this prediction counts.
The module records.py reads records, tokenizing.py turns them into documents, and tokens_layer.py writes the documents.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import datasets

from logitstore.documents.sources import find_source
from logitstore.documents.table import open_encoder, progress_bars, tokenize
from logitstore.documents.tokens_layer import read_parts, write_part
from logitstore.format.spec import ROW_CHUNK, DataSpec, StoreSpec, check_same
from logitstore.models.identity import tokenizer_spec
from logitstore.store import writer
from logitstore.store.catalog import read_attributes, stored_spec
from logitstore.store.commits.index import read_index
from logitstore.store.reader import Store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from logitstore.documents.columns import Kind
    from logitstore.storage.storage import Storage


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
    """Writes the `tokens` layer of a store, completes an unfinished layer, or appends documents to the layer.

    Args:
        storage: Root of the store, which is created if it does not exist.
        data: Path or URL of JSONL, Parquet or text files (a file, a folder or a glob), or hf:name[:split] for a data
            set on the hub.
        tokenizer: The target's tokenizer, with a chat template if the data are messages.
        max_length: Largest number of tokens in a document. Longer documents are split into windows.
        shard_rows: Largest number of rows in a shard. A value above 2**14 is rounded up to a multiple of 2**14.
        num_proc: Number of processes that tokenise.
        append: Whether to add the documents as new shards if the store has other documents. If an earlier call wrote
            exactly the same documents, they are not added again.
        storage_options: Options for the data's fsspec file system, such as credentials. They are never stored.
        progress: Whether to show progress bars.

    Returns:
        The store, opened after writing.

    Raises:
        ValueError: The data or an option is invalid. Nothing has been written in this case.
        IdentityError: The store was made with another tokenizer or with other options; or the store has other
            documents and `append` is False; or another job is appending other documents at the same time.
        LayerNotFoundError: The documents must be appended, but shards of the store's earlier documents are missing.
        MissingDriverError: No installed package can open the data's URL.
        StorageError: The data's URL or the store cannot be reached.
    """
    if num_proc < 1:
        raise ValueError(f"num_proc must be at least 1, got num_proc={num_proc}")
    # A shard that is larger than a chunk must consist of whole chunks.
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
    if stored is None:
        writer.check_free(storage)
    # The columns are not known yet. This first spec is made only to refuse bad options before any data are read.
    spec = spec_of("text", "all")
    if stored is not None:
        spec = spec_of(stored.data.columns, stored.data.mask_policy)
        check_same(stored, spec, "store", writer.OTHER_STORE)
        if source.digest is not None:
            # If the same files were written completely before, they need not be tokenised again.
            index = read_index(storage, "tokens")
            for part in read_parts(storage, stored):
                if part.data.digest == source.digest and all(shard in index for shard in part.shards):
                    return Store(storage)

    cache = Path(datasets.config.HF_DATASETS_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="logitstore-", dir=cache) as name, progress_bars(progress):
        folder = Path(name)
        dataset, encoder = open_encoder(source, folder, tokenizer, spec.tokenizer.vocab_size, max_length)
        responses = encoder.kind in ("messages", "prompt_response")
        spec = spec_of(encoder.kind, "response" if responses else "given" if "loss_mask" in encoder.columns else "all")
        # The first comparison assumed the columns of the store. The columns of the data are known only now.
        if stored is not None:
            check_same(stored, spec, "store", writer.OTHER_STORE)
        documents = tokenize(dataset, encoder, num_proc, folder, shard_rows)
        write_part(storage, spec, documents, append=append, progress=progress)
    return Store(storage)
