"""Records and a tokenizer -> documents with loss masks -> the `tokens` layer of a store. No model, no Ray.

Row i of a document holds token i, and its mask says whether the prediction made there, of token i + 1, counts.
What records are is in sources.py, how one becomes documents in encoding.py. D documents, S shards.
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

    from logitstore.documents.tokenizing import Kind
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
    """Writes the `tokens` layer of a store, or what is missing of it, or adds documents to it.

    Args:
        storage: The store's root.
        data: Path or URL of JSONL, Parquet or text (a file, a folder, a glob), or hf:name[:split].
        tokenizer: With a chat template where the data are messages.
        max_length: Most tokens of a document; longer ones are split into windows.
        shard_rows: Most rows of a shard; above 2**14 rounded up to a multiple of it.
        num_proc: Processes that tokenise.
        append: Add the documents as new shards, unless these very ones, all and no other, came into the store together.
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
        if stored is not None:
            check_same(stored, spec, "store", writer.OTHER_STORE)
        documents = tokenize(dataset, encoder, num_proc, folder, shard_rows)
        write_part(storage, spec, documents, append=append, progress=progress)
    return Store(storage)
