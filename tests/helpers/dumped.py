"""Makes a small store as the dump job does, but without Ray, and continues an existing one as a second run does."""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import logitstore
from logitstore.documents.prepare import prepare
from logitstore.dump.worker import ShardDumper
from logitstore.format.schemes import Scheme
from logitstore.format.spec import LossSpec, TargetSpec
from logitstore.models.identity import check_model
from logitstore.models.loading import ModelSource
from logitstore.storage.storage import Storage
from logitstore.store.writer import LayerWriter, add_layer
from tests.helpers.tiny import functions, write_jsonl

MAX_LENGTH = 64
SHARD_ROWS = 128
LAYERS = ("tokens", "target", "losses/reference")
ARRAYS = [
    *(f"tokens/{name}" for name in ("ids", "loss_mask", "lengths", "digests")),
    *(f"target/{name}" for name in ("counts", "gaps", "logprobs", "draws", "tail", "label_logprob", "entropy")),
    *(f"losses/reference/{name}" for name in ("ce", "label_logprob")),
]


@dataclass(frozen=True)
class Dumped:
    """A finished store, and the inputs that it was made from."""

    url: Path
    data: str
    tokenizer: Any
    target: str
    reference: str


def make(folder: Path, tiny: Any) -> Dumped:
    """Makes a store of four shards. In the second, all token ids are 0, so that tokens/ids has no object there."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny.tokenizer)
    texts = documents(tokenizer, 0, 5)
    zeros = [[0] * MAX_LENGTH] * (SHARD_ROWS // MAX_LENGTH)
    made = Dumped(
        url=folder / "cache.zarr",
        data=write_data(folder / "data.jsonl", [*texts[:2], *zeros, *texts[2:]]),
        tokenizer=tokenizer,
        target=tiny.target,
        reference=tiny.reference,
    )
    prepare_tokens(made.url, made)
    add_layers(made.url, made)
    store = logitstore.open(made.url)
    dumper = make_dumper(made.url, made)
    for shard in range(store.num_shards):
        dumper.dump(shard, LAYERS[1:])
    return made


def documents(tokenizer: Any, first: int, stop: int) -> list[list[int]]:
    """Returns token ids of real text, as lists of different lengths."""
    texts = [tokenizer(pair["prompt"] + pair["response"])["input_ids"] for pair in functions(stop)]
    return [ids[: MAX_LENGTH - 2 * i] for i, ids in enumerate(texts)][first:]


def write_data(path: Path, texts: list[list[int]]) -> str:
    """Writes documents in which the last three quarters of the tokens count."""
    masks = [[int(i >= len(ids) // 4) for i in range(len(ids))] for ids in texts]
    records = [{"input_ids": ids, "loss_mask": mask} for ids, mask in zip(texts, masks, strict=True)]
    return write_jsonl(path, records)


def prepare_tokens(url: Path, made: Dumped, data: str | None = None, *, append: bool = False) -> logitstore.Store:
    """Writes the shards of tokens that are missing."""
    return prepare(
        Storage(url), data or made.data, made.tokenizer, append=append,
        max_length=MAX_LENGTH, shard_rows=SHARD_ROWS, num_proc=1, progress=False,
    )  # fmt: skip


def add_layers(url: Path, made: Dumped) -> None:
    """Adds the layers target and losses/reference, or continues with existing ones."""
    spec = logitstore.open(url).spec

    def describe(model):
        return check_model(ModelSource(name=model), what="model", made=spec.tokenizer, max_length=MAX_LENGTH)[0]

    # `sample` is the only scheme for which every array has an object.
    target = TargetSpec(model=describe(made.target), scheme=Scheme(name="sample", k=0, num_draws=6, seed=1))
    add_layer(Storage(url), spec, "target", target)
    spec = dataclasses.replace(spec, target=target)
    add_layer(Storage(url), spec, "losses/reference", LossSpec(model=describe(made.reference)))


def make_dumper(url: Path, made: Dumped) -> ShardDumper:
    """Returns a dumper with both models loaded."""
    sources = ModelSource(name=made.target), {"reference": ModelSource(name=made.reference)}
    return ShardDumper(Storage(url), *sources, batch_tokens=256, device="cpu")


def missing(url: Path) -> set[tuple[str, int]]:
    """Returns (layer, shard) of all shards that are not committed."""
    return {(name, shard) for name, layer in logitstore.open(url).layers.items() for shard in layer.missing}


def write_missing(url: Path, made: Dumped) -> None:
    """Writes the missing shards: tokens from the data, other layers with the values of the finished store."""
    prepare_tokens(url, made)
    whole, store = logitstore.open(made.url), logitstore.open(url)
    for layer, shard in sorted(missing(url)):
        commit = whole.reader.commit(layer, shard)
        LayerWriter(store.storage, store.spec, layer).write(
            shard,
            whole.reader.read_arrays(layer, shard),
            documents=commit.documents,
            rows=commit.rows,
            counted=commit.counted,
            computed_from=commit.computed_from,
            started=time.monotonic(),
        )


def record(url: Path, layer: str, shard: int) -> Path:
    """Returns the path of the commit record of a shard."""
    (path,) = Path(url, "commits", layer).glob(f"{shard:06d}-*.json")
    return path


def edit_record(path: Path, **changes: Any) -> None:
    """Changes fields of a commit record and updates its checksum."""
    from logitstore.format.commit import CHECKSUM_FIELD, record_checksum

    values = json.loads(path.read_text())
    del values[CHECKSUM_FIELD]
    values |= changes
    path.write_text(json.dumps({CHECKSUM_FIELD: record_checksum(values)} | values))


def contents(url: Path) -> dict[str, bytes]:
    """Returns the content of every file except the commit records, which contain the time of writing."""
    files = [path for path in sorted(Path(url).rglob("*")) if path.is_file()]
    return {str(path.relative_to(url)): path.read_bytes() for path in files if "commits" not in path.parts}


def times(url: Path) -> dict[str, int]:
    """Returns the time of the last change of each file."""
    return {str(path.relative_to(url)): path.stat().st_mtime_ns for path in Path(url).rglob("*") if path.is_file()}
