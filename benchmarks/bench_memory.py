"""Memory of a dump with the real job at the largest vocabulary, 262,144 tokens, and documents of 4,096 tokens.

    python -m benchmarks.bench_memory [--schemes "topk --k 64" "hybrid --num_draws 50"] [--record]

A target and a reference with random weights are saved with a tokenizer of this vocabulary. Embedding and head are most
of their weights, as in small models with such vocabularies. `jobs/dump_logits.py` then dumps tokens, rows and losses of
documents with `--length` ids each, in which every row counts, in a process of its own. The memory of this process and
its children is sampled 20 times a second. The benchmark fails if the actor, the process with the models and whole
distributions, takes more than

    weights of all models + 1 GiB + 64 KiB for each token of a batch

The 1 GiB covers the fixed parts: the process with its libraries, a chunk of logits and its truncation, the rows for
measuring fidelity, and the entries of two shards. The last term covers the activations of the backbone for a batch.
Attention that is not fused, or a much wider model, takes more.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import psutil
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

JOB = Path(__file__).parents[1] / "jobs" / "dump_logits.py"
RESULTS = Path(__file__).parent / "results"
SCHEMES = ("topk --k 64", "nucleus --k 64", "sample --num_draws 50", "hybrid --num_draws 50")
FIXED_BYTES = 2**30
BYTES_PER_TOKEN = 2**16
LOOK_S = 0.05


def make_models(folder, args):
    """Saves a target and a reference with their tokenizer. Returns the bytes of their weights."""
    words = {f"w{i}": i for i in range(args.vocab_size)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")))
    total = 0
    for seed, (name, layers) in enumerate((("target", args.layers), ("reference", 1))):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=args.vocab_size, hidden_size=args.hidden, intermediate_size=args.hidden * 4,
            num_hidden_layers=layers, num_attention_heads=args.hidden // 64, max_position_embeddings=args.length,
            tie_word_embeddings=False,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            model.lm_head.weight.mul_(16 * (512 / args.hidden) ** 0.5)  # makes distributions peaked
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        total += sum(p.numel() * p.element_size() for p in model.parameters())
    return total


def make_documents(path, args):
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for _ in range(args.documents):
            ids = rng.zipf(1.3, args.length) % args.vocab_size
            file.write(json.dumps({"input_ids": ids.tolist()}) + "\n")


class Peaks:
    """The peak memory of processes, for each process and in total."""

    def __init__(self):
        self.by_name, self.together = {}, 0

    def look(self, root):
        """Samples the memory of a process and its children."""
        total = 0
        for process in [root, *root.children(recursive=True)]:
            try:
                name, own = process.cmdline(), process.memory_info().rss
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue  # the process has just ended
            total += own
            key = "job" if process == root else (name[0].split("(")[0] if name else "?")
            self.by_name[key] = max(self.by_name.get(key, 0), own)
        self.together = max(self.together, total)


def dump(folder, scheme, args):
    """Runs the job. Returns its figures and the peaks."""
    url = folder / "cache.zarr"
    command = [
        sys.executable, str(JOB), "--store", str(url), "--target", str(folder / "target"), "--reference",
        f"ref={folder / 'reference'}", "--data", str(folder / "documents.jsonl"), "--max_length", str(args.length),
        "--shard_rows", str(args.shard_rows), "--batch_tokens", str(args.batch_tokens), "--num_proc", "1",
        "--no_progress", "--scheme", *scheme.split(),
    ]  # fmt: skip
    peaks = Peaks()
    with (folder / "out.txt").open("w+") as out:
        job = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        root = psutil.Process(job.pid)
        while job.poll() is None:
            peaks.look(root)
            time.sleep(LOOK_S)
        out.seek(0)
        text = out.read()
    if job.returncode:
        raise RuntimeError(f"the dump must end with 0, got {job.returncode}:\n{text}")
    return json.loads(text[text.index("{") :]), peaks


def report(args):
    """Yields lines of Markdown. Raises SystemExit at the end if an actor took more than the bound."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = make_models(folder, args)
        make_documents(folder / "documents.jsonl", args)
        bound = weights + FIXED_BYTES + args.batch_tokens * BYTES_PER_TOKEN
        yield f"Weights {gib(weights)}, batches of {args.batch_tokens} tokens: the bound is {gib(bound)}."
        yield ""
        yield "| scheme | rows | rows/s | actor's peak | of the bound | actor less weights | all processes together |"
        yield "|---|---|---|---|---|---|---|"
        worst = 0.0
        for scheme in args.schemes:
            figures, peaks = dump(folder, scheme, args)
            actor = max(peak for name, peak in peaks.by_name.items() if name.startswith("ray::ShardDumper"))
            worst = max(worst, actor / bound)
            yield (
                f"| {scheme.replace(' --', ', ')} | {figures['counted_rows']} | {figures['rows_per_second']} "
                f"| {gib(actor)} | {actor / bound:.2f} | {gib(actor - weights)} | {gib(peaks.together)} |"
            )
            for path in sorted((folder / "cache.zarr").rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
        yield ""
        if worst > 1:
            yield f"FAILED: {worst:.2f} of the bound."
            sys.exit(1)


def gib(num_bytes):
    return f"{num_bytes / 2**30:.2f} GiB"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab_size", type=int, default=262_144)
    parser.add_argument("--length", type=int, default=4096, help="tokens of a document")
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--shard_rows", type=int, default=16_384)
    parser.add_argument("--batch_tokens", type=int, default=16_384, help="as of the job")
    parser.add_argument("--schemes", nargs="+", default=SCHEMES, metavar="'NAME --OPTION VALUE'")
    parser.add_argument("--record", action="store_true", help=f"writes {RESULTS.name}/ too")
    args = parser.parse_args(argv)
    day = datetime.datetime.now(datetime.UTC).date()
    lines = [
        f"# memory of a dump, CPU, {day}", "",
        f"{os.cpu_count()} shared {platform.machine()} cores, {gib(psutil.virtual_memory().total)}; Python "
        f"{platform.python_version()}, torch {torch.__version__}. Memory is resident; together what several share "
        "counts for each.", "",
        f"    python -m benchmarks.bench_memory --vocab_size {args.vocab_size} --length {args.length} --documents "
        f"{args.documents} --hidden {args.hidden} --layers {args.layers} --shard_rows {args.shard_rows} "
        f"--batch_tokens {args.batch_tokens}", "",
    ]  # fmt: skip
    try:
        for line in report(args):
            print(line, flush=True)
            lines.append(line)
    finally:
        if args.record:
            (RESULTS / f"memory_cpu-{os.cpu_count()}-cores_{day}.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
