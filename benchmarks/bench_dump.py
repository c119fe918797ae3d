"""Rows/s of the dump relative to the bare forward pass of the same model on the same batches, in one run.

    python -m benchmarks.bench_dump [--hidden 512 --layers 8 --vocab_size 8192]
    python -m benchmarks.bench_dump --hidden 2048 --layers 16 --vocab_size 131072 --dtype bfloat16 --length 4096 \
        --shard_rows 65536 --batch_tokens 16384 --profile         1.6 B parameters, for a GPU; 9.7 B: 4096, 32

The bare forward pass is `model(input_ids).logits`. The chunked one runs the head on chunks of rows, which can be
faster; both are compared. Scoring adds the truncation, up to arrays on the host. The dump is all the work of an actor
with two shards in flight: reading tokens, backbone, head on the rows that count, truncation, codes, fidelity
measurements and their control, encoding, compression, checksums, writing to a local folder, and commit. The shares are
differences of separately timed stages, so work hidden behind the device counts as 0, and noise can make a small share
negative. `--profile` adds the operations that take most of the time of scoring a shard.

Every row counts here, which is the worst case for the dump: with a loss mask, the head runs on fewer rows. Tokens and
weights are random (Zipf ids, peaked logits), because only time is measured.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from logitstore.dump.schedule import SHARDS_IN_FLIGHT
from logitstore.dump.scoring.score import score_target
from logitstore.dump.worker import ShardDumper
from logitstore.format.schemes import OPTIONS, make_scheme
from logitstore.format.spec import DataSpec, ModelSpec, StoreSpec, TargetSpec, TokenizerSpec
from logitstore.models.loading import ModelSource
from logitstore.rows.batches import batches
from logitstore.rows.tokens import encode_tokens
from logitstore.storage.storage import Storage
from logitstore.store import writer
from logitstore.store.reader import Store
from logitstore.store.take_back import take_back


def make_model(folder, args):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocab_size, hidden_size=args.hidden, intermediate_size=args.hidden * 4,
        num_hidden_layers=args.layers, num_attention_heads=args.hidden // 64, max_position_embeddings=args.length,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(getattr(torch, args.dtype))
    with torch.no_grad():
        model.lm_head.weight.mul_(16 * (512 / args.hidden) ** 0.5)  # makes distributions peaked as in trained models
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def make_store(folder, args):
    rng = np.random.default_rng(0)
    target = TargetSpec(
        model=ModelSpec(name="bench", revision="0", dtype=args.dtype, padded_vocab_size=args.vocab_size),
        scheme=make_scheme(args.scheme, {"k": args.k, "num_draws": args.num_draws}),
    )
    spec = StoreSpec(
        tokenizer=TokenizerSpec(name="none", fingerprint="none", vocab_size=args.vocab_size, chat_template=None),
        data=DataSpec(source="zipf", digest=None, columns="input_ids", mask_policy="all"),
        max_length=args.length, shard_rows=args.shard_rows, num_shards=args.shards, target=target,
    )  # fmt: skip
    storage = Storage(folder)
    writer.create_store(storage, spec)
    writer.add_layer(storage, spec, "target", target)
    tokens = writer.LayerWriter(storage, spec, "tokens")
    for shard in range(args.shards):
        lengths = []
        while sum(lengths) <= args.shard_rows - args.length:
            lengths.append(int(rng.integers(args.length // 4, args.length + 1)))
        ids = (rng.zipf(1.3, sum(lengths)) % args.vocab_size).astype(np.uint32)
        mask = np.ones(len(ids), np.uint8)
        mask[np.cumsum(lengths) - 1] = 0
        arrays = encode_tokens(ids, mask, np.array(lengths))
        tokens.write(shard, arrays, documents=len(lengths), rows=len(ids), counted=int(mask.sum()), computed_from=None,
                     started=time.monotonic())  # fmt: skip
    return storage


@torch.no_grad()
def forward(dumper, storage, args, *, head):
    """Returns the seconds of the forward pass alone on the batches of the dump. `head`: "whole", "chunks" or "none"."""
    lm = dumper._target
    shards = list(Store(storage).shards(("tokens",)))
    work = [batch for shard in shards for batch in batches(shard, args.batch_tokens)]
    synchronize(args)
    started = time.perf_counter()
    for batch in work:
        ids = torch.from_numpy(batch.ids).to(lm.device)
        if head == "whole":
            lm.model(input_ids=ids, use_cache=False).logits  # noqa: B018
            continue
        hidden = lm.hidden(ids).flatten(0, 1)[torch.from_numpy(batch.places).to(lm.device)]
        for start in range(0, len(hidden) if head == "chunks" else 0, lm.rows_per_chunk):
            lm.logits(hidden[start : start + lm.rows_per_chunk])
    synchronize(args)
    return time.perf_counter() - started


def score(dumper, storage, args):
    """Returns the seconds of scoring alone: the work on the device, up to arrays on the host."""
    store = Store(storage)
    shards = list(store.shards(("tokens",)))
    synchronize(args)
    started = time.perf_counter()
    for shard in shards:
        score_target(dumper._target, shard, store.spec.target, batch_tokens=args.batch_tokens)
    return time.perf_counter() - started


def profile(dumper, storage, args):
    """Prints the operations that take most of the time of scoring the first shard."""
    store = Store(storage)
    shard = store.read_shard(0, ("tokens",))
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if args.device == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as found:
        score_target(dumper._target, shard, store.spec.target, batch_tokens=args.batch_tokens)
    by = "self_device_time_total" if args.device == "cuda" else "self_cpu_time_total"
    print(found.key_averages().table(sort_by=by, row_limit=15, max_name_column_width=60))


def dump(dumper, args):
    """Returns the seconds of the whole dump, as an actor runs it."""
    for shard in range(args.shards):
        take_back(dumper._storage, "target", shard)  # deletes the shard of the previous round
    started = time.perf_counter()
    with ThreadPoolExecutor(SHARDS_IN_FLIGHT) as pool:
        list(pool.map(lambda shard: dumper.dump(shard, ("target",)), range(args.shards)))
    return time.perf_counter() - started


def spread(ratios):
    """Returns the median, smallest and largest of the ratios of the rounds."""
    return {name: round(f(ratios), 3) for name, f in (("median", statistics.median), ("min", min), ("max", max))}


def synchronize(args):
    if args.device == "cuda":
        torch.cuda.synchronize()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab_size", type=int, default=8192)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--shard_rows", type=int, default=4096)
    parser.add_argument("--shards", type=int, default=3)
    parser.add_argument("--batch_tokens", type=int, default=4096)
    parser.add_argument("--scheme", choices=tuple(OPTIONS), default="nucleus")
    parser.add_argument("--k", type=int, help="of topk and nucleus")
    parser.add_argument("--num_draws", type=int, help="of sample and hybrid")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="print what scoring spends its time on")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parameters = make_model(folder / "model", args)
        storage = make_store(str(folder / "cache.zarr"), args)
        source = ModelSource(name=str(folder / "model"), dtype=args.dtype)
        dumper = ShardDumper(storage, source, {}, batch_tokens=args.batch_tokens, device=args.device)
        rounds = [
            {
                "backbone": forward(dumper, storage, args, head="none"),
                "chunked": forward(dumper, storage, args, head="chunks"),
                "bare": forward(dumper, storage, args, head="whole"),
                "scoring": score(dumper, storage, args),
                "dump": dump(dumper, args),
            }
            for _ in range(args.rounds + 1)
        ][1:]  # the first round is a warm-up
        if args.profile:
            profile(dumper, storage, args)
        store = Store(storage)
        rows, entries = (
            store.num_rows,
            sum(store.reader.commit("target", shard).entries for shard in range(args.shards)),
        )
    median = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
    result = {
        "parameters": parameters,
        "rows": rows,
        "entries_per_row": round(entries / rows, 1),
        "rows_per_s": {name: round(rows / taken) for name, taken in median.items()},
        "dump_over_bare_forward": spread([one["bare"] / one["dump"] for one in rounds]),
        "dump_over_chunked_forward": spread([one["chunked"] / one["dump"] for one in rounds]),
        "scoring_over_chunked_forward": spread([one["chunked"] / one["scoring"] for one in rounds]),
        "share_of_dump": {
            "backbone": spread([one["backbone"] / one["dump"] for one in rounds]),
            "head": spread([(one["chunked"] - one["backbone"]) / one["dump"] for one in rounds]),
            "truncation": spread([(one["scoring"] - one["chunked"]) / one["dump"] for one in rounds]),
            "rest": spread([(one["dump"] - one["scoring"]) / one["dump"] for one in rounds]),
        },
        "settings": {name: getattr(args, name) for name in vars(args)},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": torch.cuda.get_device_name() if args.device == "cuda" else platform.machine(),
    }
    print(json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    main()
