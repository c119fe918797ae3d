"""Rows/s of the loader alone, compared with training the demo's drafts from the same store, in one run.

    python -m benchmarks.bench_loader [--shards 24 --seconds 20 --record]

The store equals the demo's in everything that costs time: documented functions of the standard library with the same
vocabulary, length, scheme and shards. One shard is a real dump of a target with random peaked weights; the others are
copies. Rows are those whose loss mask is 1. The bucket is a real S3 server on loopback, in a process of its own, which
also needs a core.

Loader: one epoch in batches of 8 packs, from the first request to the last batch; first: seconds to the first batch.
Trained: rows/s of DraftTrainer as Trainer counts them, with batches of 8 documents and all rows.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.append(str(Path(__file__).parents[1] / "jobs"))

import numpy as np
import torch
import transformers
from _demo.corpus import read_pairs, standard_library, train_tokenizer
from _demo.models import DRAFTS, MAX_LENGTH, TARGET, save_new_model
from transformers import AutoModelForCausalLM, TrainingArguments

import logitstore
from logitstore.dump.worker import ShardDumper
from logitstore.format.schemes import make_scheme
from logitstore.format.spec import DataSpec, ModelSpec, StoreSpec, TargetSpec
from logitstore.models.identity import tokenizer_spec
from logitstore.models.loading import ModelSource, load_model
from logitstore.rows.tokens import encode_tokens
from logitstore.storage.storage import Storage
from logitstore.store import writer
from trainer import DocumentDataset, DraftModule, DraftTrainer
from trainer.data.loader import RankBatches, make_loader
from trainer.data.sharding import Deal
from trainer.loss.objectives import make_objective
from trainer.loss.selection import SELECTIONS, Rule

RESULTS = Path(__file__).parent / "results"
VOCAB_SIZE, SHARD_ROWS, NUM_DRAWS, BATCH = 2048, 32768, 50, 8
BUCKET = "s3://bench/cache.zarr"
PACK_LENGTH = 4 * MAX_LENGTH


def shard_tokens(tokenizer, pairs):
    """Returns the arrays of tokens of the documents that fill a shard."""
    ids, masks = [], []
    for pair in pairs:
        prompt, response = (tokenizer(text)["input_ids"] for text in (pair.prompt, pair.response))
        document = [*prompt, *response, tokenizer.eos_token_id][:MAX_LENGTH]
        if sum(map(len, ids)) + len(document) > SHARD_ROWS:
            break
        ids.append(document)
        first = min(len(prompt), len(document)) - 1
        masks.append([0] * first + [1] * (len(document) - first - 1) + [0])
    return encode_tokens(np.concatenate(ids), np.concatenate(masks), np.array([len(part) for part in ids]))


def make_store(url, options, tokenizer, target, values, num_shards):
    """Writes a store of equal shards. `values` are their arrays by layer; without a target, they are dumped first."""
    model = ModelSpec(name="bench", revision="0", dtype="float32", padded_vocab_size=len(tokenizer))
    layer = TargetSpec(model=model, scheme=make_scheme("hybrid", {"num_draws": NUM_DRAWS}))
    spec = StoreSpec(
        tokenizer=tokenizer_spec(tokenizer, uses_chat_template=False), max_length=MAX_LENGTH, shard_rows=SHARD_ROWS,
        data=DataSpec(source="bench", digest=None, columns="input_ids", mask_policy="given"), num_shards=num_shards,
        target=layer,
    )  # fmt: skip
    storage = Storage(url, options)
    writer.create_store(storage, spec)
    writer.add_layer(storage, spec, "target", layer)
    tokens = values["tokens"]
    size = {"documents": len(tokens["lengths"]), "rows": len(tokens["ids"]), "counted": int(tokens["loss_mask"].sum())}
    size["started"] = time.monotonic()
    for shard in range(num_shards):
        commit = writer.LayerWriter(storage, spec, "tokens").write(shard, tokens, computed_from=None, **size)
        if "target" not in values:
            source = ModelSource(name=target, dtype="float32")
            ShardDumper(storage, source, {}, batch_tokens=4096, device="cpu").dump(0, ("target",))
            return
        arrays = values["target"]
        writer.LayerWriter(storage, spec, "target").write(shard, arrays, computed_from=commit.digest, **size)


def load_alone(url, options, *, packing, workers):
    """Returns the rows/s of an epoch and the seconds to its first batch."""
    data = DocumentDataset([logitstore.open(url, options)], packing=packing, pack_length=PACK_LENGTH)
    batches = RankBatches(data.order, Deal(per_device_batch=BATCH))
    rows, first = 0, 0.0
    started = time.perf_counter()
    for batch in make_loader(data, batches, num_workers=workers):
        first = first or time.perf_counter() - started
        rows += len(batch["labels"])
    data.close()
    return rows / (time.perf_counter() - started), first


def train(url, options, draft, folder, tokenizer, *, workers, seconds):
    """Returns the rows/s of training, which runs for about `seconds`."""
    data = DocumentDataset([logitstore.open(url, options)])

    def run(steps):
        selection = SELECTIONS["all"]
        module = DraftModule(
            AutoModelForCausalLM.from_pretrained(draft), vocab_size=VOCAB_SIZE, objective=make_objective("forward_kl"),
            rule=Rule(selection=selection, scope=selection.scope, keep=1.0, outside_weight=0.0),
        )  # fmt: skip
        args = TrainingArguments(
            output_dir=str(folder), max_steps=steps, per_device_train_batch_size=BATCH, use_cpu=True, report_to="none",
            disable_tqdm=True, save_strategy="no", logging_strategy="no", dataloader_num_workers=workers,
            remove_unused_columns=False, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = DraftTrainer(module, args, data, tokenizer)
        started = time.perf_counter()
        trainer.train()
        taken = time.perf_counter() - started
        return taken, trainer.state.log_history[-1]["train_rows_per_second"]

    taken, _ = run(10)
    return run(max(20, round(10 * seconds / taken)))[1]


def measure(places, drafts, folder, tokenizer, args):
    """Yields the lines of the record."""
    alone = {}
    yield from ["## The loader alone", "", "| store | packing | workers | rows/s | first, s |", "|---|---|---|---|---|"]
    for place, (url, options) in places.items():
        for packing in (False, True):
            for workers in (0, 1, 2):
                found = [load_alone(url, options, packing=packing, workers=workers) for _ in range(args.rounds)]
                rate, first = max(found)
                alone[place, packing, workers] = rate
                yield f"| {place} | {'yes' if packing else 'no'} | {workers} | {rate:,.0f} | {first:.2f} |"
    yield from ["", "## Beside training", "", "| store | draft | workers | rows/s trained | loader alone over it |"]
    yield "|---|---|---|---|---|"
    for draft, path in drafts.items():
        for place, (url, options) in places.items():
            for workers in (0, 1, 2):
                rate = train(url, options, path, folder / "out", tokenizer, workers=workers, seconds=args.seconds)
                ratio = alone[place, False, 0] / rate
                yield f"| {place} | {draft} | {workers} | {rate:,.0f} | {ratio:.0f} |"


def run(folder, server, args):
    """Makes the stores and the drafts. Yields the lines of the record."""
    from tests.helpers.faults import s3_options

    pairs = read_pairs(standard_library())
    tokenizer = train_tokenizer(pairs[:3000], VOCAB_SIZE)
    save_new_model(TARGET, tokenizer, folder / "target", seed=0)
    source = ModelSource(name=str(folder / "target"), dtype="float32")
    target = load_model(source, what="target", device="cpu")
    with torch.no_grad():
        target.lm_head.weight.mul_(6)  # makes distributions peaked as in trained models
    target.save_pretrained(folder / "target")
    values = {"tokens": shard_tokens(tokenizer, pairs)}
    make_store(str(folder / "one.zarr"), None, tokenizer, str(folder / "target"), values, 1)
    one = logitstore.open(str(folder / "one.zarr"))
    values["target"] = one.reader.read_arrays("target", 0)
    entries = len(values["target"]["gaps"]) / one.num_counted
    server.make_bucket("bench")
    places = {"folder": (str(folder / "cache.zarr"), None), "bucket": (BUCKET, s3_options(server.url))}
    for url, options in places.values():
        make_store(url, options, tokenizer, None, values, args.shards)
    drafts = {size.name: folder / size.name for size in DRAFTS}
    for size in DRAFTS:
        save_new_model(size, tokenizer, drafts[size.name], seed=1)
    packed = DocumentDataset([logitstore.open(places["folder"][0])], packing=True, pack_length=PACK_LENGTH).order
    shape = f"{len(one)} documents, {one.num_rows:,} tokens, {one.num_counted:,} rows and {entries:.1f} entries a row"
    yield f"{args.shards} shards of {shape}; packs of {PACK_LENGTH} tokens waste {100 * packed.waste:.1f} %."
    yield ""
    yield from measure(places, drafts, folder, tokenizer, args)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=2, help="of the loader; the faster one counts")
    parser.add_argument("--seconds", type=float, default=20, help="of each training (default %(default)s)")
    parser.add_argument("--record", action="store_true", help=f"write {RESULTS.name}/ too")
    args = parser.parse_args(argv)
    transformers.logging.disable_progress_bar()
    from tests.helpers.faults import S3Server

    day = datetime.datetime.now(datetime.UTC).date()
    command = f"--shards {args.shards} --rounds {args.rounds} --seconds {args.seconds:g}"
    lines = [
        f"# The loader, CPU, {day}", "",
        f"{platform.machine()}, {os.cpu_count()} shared cores, load {os.getloadavg()[0]:.1f} before; Python "
        f"{platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}.", "",
        f"    python -m benchmarks.bench_loader {command}", "",
    ]  # fmt: skip
    print("\n".join(lines))
    with tempfile.TemporaryDirectory() as name, S3Server() as server:
        for line in run(Path(name), server, args):
            print(line, flush=True)
            lines.append(line)
    lines += ["", f"Load {os.getloadavg()[0]:.1f} afterwards."]
    if args.record:
        (RESULTS / f"loader_cpu-{os.cpu_count()}-cores_{day}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
