"""Cost of training from the cache, compared with fine-tuning on text and with AdaSPEC with all models in one loop.

    python -m benchmarks.bench_train step [--vocab_size 131072 --hidden 256 ...] [--rounds 3] [--record]
    python -m benchmarks.bench_train adaspec [--drafts 5] [--steps 300] [--temperature 0.6 --warm_start] [--record]

`step` trains the same draft with the same optimizer and batches in transformers' Trainer, where the model computes its
own cross entropy with all logits, and in DraftTrainer: with all rows, with AdaSPEC (0.4 of the rows), and with a static
gap, which needs no additional pass through the draft. The rows come from random models with a vocabulary of any size;
every row counts. Each run is a process, and the runs are repeated in rounds. The rate of a run is that of its median
step, and the best round of each kind is reported because machines are shared. Memory is the peak of the process during
training minus its memory before a model is loaded, or on a GPU the peak of its tensors.

`adaspec` uses real text and a trained target (benchmarks/_distributions.py, `demo`). As published: a reference is
distilled with the target in the loop, then the draft with target and reference in the loop, every step on whole
vocabularies. From the cache: one dump, then for each draft a reference, its losses, and the draft. Both start from the
same initial weights and use the same documents in the same order. Acceptance is measured on held-out documents whose
rows keep every token. The selected sets are compared on all training documents for the same draft and reference: gaps
of whole distributions and gaps of the cache. `--temperature` below 1 makes the target's distributions as peaked as
those of large models. Drafts start with random weights or, with `--warm_start`, from a draft trained on the text for
the same number of steps.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import _distributions

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ADDRESS", "local")

import numpy as np
import torch
import transformers
from _demo import models
from _demo.corpus import write_jsonl
from tokenizers import Tokenizer
from tokenizers import models as token_models
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import logitstore
from benchmarks._train_worker import LEFT_OUT
from logitstore.commands import dump as dump_command
from trainer.evaluation.from_cache import cached_acceptance

RESULTS = Path(__file__).parent / "results"
KEEP = 0.4
MIB = 2**20
DOCUMENTS = shlex.split("--max_length 256 --shard_rows 16384 --no_progress")
BATCH = 8
SCHEMES = ["hybrid --num_draws 50", "topk --k 2048"]
"""The recommended scheme, and whole distributions, which differ from those in the loop only by the codes."""


def job(folder, argv):
    """Runs a dump in this process. Returns its seconds."""
    began = time.perf_counter()
    with (folder / "log.txt").open("a") as log, contextlib.redirect_stdout(log):
        dump_command.run([str(part) for part in argv])
    return time.perf_counter() - began


def work(**spec):
    """Runs a worker to its end. Returns its results."""
    command = [sys.executable, "-m", "benchmarks._train_worker", json.dumps(spec)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the worker of {spec} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# ---- a step ----


def make_words(folder, vocab_size):
    words = {f"w{i}": i for i in range(vocab_size)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(token_models.WordLevel(words, unk_token="w0")))
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_model(folder, tokenizer, args, *, hidden, layers, seed):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=args.vocab_size, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64), max_position_embeddings=args.length, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_store(folder, args):
    """Dumps random text by a random target, with the losses of two random models."""
    tokenizer = make_words(folder / "draft", args.vocab_size)
    make_model(folder / "draft", tokenizer, args, hidden=args.hidden, layers=args.layers, seed=0)
    for seed, name in enumerate(("target", "reference", "initial"), start=1):
        make_model(folder / name, tokenizer, args, hidden=64, layers=1, seed=seed)
    rng = np.random.default_rng(0)
    with (folder / "data.jsonl").open("w") as file:
        for _ in range(args.batch * (args.steps + 1)):
            file.write(json.dumps({"input_ids": (rng.zipf(1.3, args.length) % args.vocab_size).tolist()}) + "\n")
    argv = ["--store", folder / "store", "--target", folder / "target", "--data", folder / "data.jsonl"]
    argv += ["--max_length", args.length, "--shard_rows", 2**15, "--no_progress", "--scheme", "hybrid"]
    for name in ("reference", "initial"):
        argv += ["--reference", f"{name}={folder / name}"]
    job(folder, argv)
    return folder / "store"


KINDS = {
    "cross entropy of the text": {"kind": "ce"},
    "cache, all rows": {"kind": "cache"},
    "cache, adaspec": {"kind": "cache", "selection": "adaspec", "reference": "reference"},
    "cache, random": {"kind": "cache", "selection": "random"},
}


def bench_step(args):
    folder = _distributions.FOLDER / "train_step"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    store = make_store(folder, args)
    common = {
        "store": str(store), "draft": str(folder / "draft"), "steps": args.steps, "batch": args.batch, "seed": 0,
        "output_dir": str(folder / "out"), "learning_rate": 1e-4, "bf16": args.bf16, "keep": KEEP,
        "threads": args.threads,
    }  # fmt: skip
    found = {kind: [] for kind in KINDS}
    for number in range(args.rounds):
        for kind, spec in KINDS.items():
            found[kind].append(work(**common, **spec))
        print("\n".join(["", f"after round {number + 1}:", *step_table(found)]), flush=True)
    tokens = args.batch * args.length
    head = 6 * tokens * args.vocab_size * args.hidden
    draft = AutoModelForCausalLM.from_pretrained(folder / "draft")
    body = 6 * tokens * sum(p.numel() for name, p in draft.named_parameters() if "embed" not in name)
    whole, looked, chosen = head + body, head * (2 + 6 * KEEP) / 6 + body, head * KEEP + body
    yield f"## V = {args.vocab_size:,}, H = {args.hidden}, {args.layers} layers, {args.batch} x {args.length} tokens"
    yield ""
    yield from step_table(found)
    yield ""
    yield (
        f"{args.rounds} rounds of {args.steps} steps, the first {LEFT_OUT} of each not timed. Of {whole / 1e9:,.0f} "
        f"GFLOP of a step of fine-tuning {head / whole:.0%} are the head's. At keep {KEEP} with a look at all rows it "
        f"takes (2 + 6 x {KEEP}) / 6 = {(2 + 6 * KEEP) / 6:.2f} of that: {whole / looked:.2f} times the rate if flops "
        f"were all; without a look {whole / chosen:.2f}. Logits of all rows are "
        f"{tokens * args.vocab_size * 4 / MIB:,.0f} MiB in float32."
    )


def step_table(found):
    first = next(iter(found))
    seconds = {kind: [statistics.median(run["steps_s"]) for run in runs] for kind, runs in found.items()}
    memory = {kind: min(run["peak_bytes"] - run["libraries_bytes"] for run in runs) for kind, runs in found.items()}
    yield "| | ms a step, best round | all rounds | rate, of the first | peak memory, MiB | of the first |"
    yield "|---|---|---|---|---|---|"
    for kind in found:
        yield (
            f"| {kind} | {1e3 * min(seconds[kind]):,.0f} | {', '.join(f'{1e3 * s:,.0f}' for s in seconds[kind])} "
            f"| {min(seconds[first]) / min(seconds[kind]):.2f} | {memory[kind] / MIB:,.0f} "
            f"| {memory[kind] / memory[first]:.2f} |"
        )


# ---- AdaSPEC ----

LOOP = "in one loop"


class Adaspec:
    """The common target, text, initial drafts and held-out rows of all methods, and a store for each scheme."""

    def __init__(self, args):
        self.args = args
        self.folder = _distributions.FOLDER / "train_adaspec"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        _distributions.make("demo", _distributions.RECIPES["demo"])
        self.target = _distributions.FOLDER / "demo" / "target"
        tokenizer = AutoTokenizer.from_pretrained(self.target)
        self.vocab_size = len(tokenizer)
        for name, held_out in (("train", False), ("held_out", True)):
            write_jsonl(self.folder / f"{name}.jsonl", _distributions.functions(held_out=held_out))
        for seed in range(args.drafts):
            models.save_new_model(models.DRAFTS[0], tokenizer, self.folder / f"new-{seed}", seed=seed + 1)
        if args.temperature != 1:
            self.target = _distributions.sharpen(self.target, self.folder / "target", args.temperature)
        self.check, _ = self.dump("held_out", f"topk --k {self.vocab_size}")
        self.entropy = np.nanmean([np.nanmean(document.rows.entropy) for document in logitstore.open(self.check)])
        dumped = {scheme: self.dump("train", scheme) for scheme in args.schemes}
        self.stores = {scheme: store for scheme, (store, _) in dumped.items()}
        self.dump_s = {scheme: seconds for scheme, (_, seconds) in dumped.items()}
        for seed in range(args.drafts if args.warm_start else 0):
            made, _ = self.train("warm", seed, next(iter(self.stores.values())), kind="ce")
            shutil.rmtree(self.folder / f"new-{seed}")
            made.rename(self.folder / f"new-{seed}")

    def dump(self, data, scheme):
        """Dumps a file of documents. Returns the store and the seconds."""
        url = self.folder / f"{data} {scheme}".replace(" --", "_").replace(" ", "_")
        argv = ["--store", url, "--target", self.target, "--data", self.folder / f"{data}.jsonl", *DOCUMENTS]
        return url, job(self.folder, [*argv, "--scheme", *scheme.split()])

    def add_losses(self, store, models_):
        """Dumps the losses of models on the training rows. Returns the seconds."""
        argv = ["--store", store, "--no_progress"]
        for name, model in models_.items():
            argv += ["--reference", f"{name}={model}"]
        return job(self.folder, argv)

    def train(self, name, seed, store, **spec):
        """Trains one model. Returns its folder and the results of the worker."""
        out = self.folder / f"{name}-{seed}"
        common = {"store": str(store), "draft": str(self.folder / f"new-{seed}"), "seed": seed, "save": True}
        found = work(
            **common, **spec, steps=self.args.steps, batch=BATCH, output_dir=str(out), keep=KEEP,
            threads=self.args.threads,
        )  # fmt: skip
        return out, found

    def alpha(self, draft):
        """Measures a draft on the held-out rows."""
        found = cached_acceptance(AutoModelForCausalLM.from_pretrained(draft), logitstore.open(self.check))
        return {"sampled": found.alpha_estimate, "greedy": found.argmax_agreement}

    def exact_gaps(self, drafts, reference):
        """Returns the gaps of several drafts from whole distributions, at the rows of every fourth document."""
        store = logitstore.open(next(iter(self.stores.values())))
        loaded = [AutoModelForCausalLM.from_pretrained(path).eval() for path in (self.target, reference, *drafts)]
        gaps = [[] for _ in drafts]
        for number in range(0, len(store), 4):
            document = store[number]
            ids = torch.from_numpy(document.ids.astype(np.int64))[None]
            with torch.no_grad():
                logits = [model(input_ids=ids).logits[0, document.loss_mask, : self.vocab_size] for model in loaded]
            log_p, log_r, *log_qs = (each.log_softmax(-1) for each in logits)
            for own, log_q in zip(gaps, log_qs, strict=True):
                own.append((log_p.exp() * (log_r - log_q)).sum(-1).numpy())
        return gaps

    def stored_gaps(self, scheme, draft, reference):
        """Returns the same gaps from the losses of a store."""
        gap = logitstore.open(self.stores[scheme]).gap(draft, reference)
        return [gap[number][np.isfinite(gap[number])] for number in range(0, len(gap), 4)]


def overlap(exact, cached):
    """Returns the share of rows that both select in micro-batches of BATCH documents, as in the paper."""
    same = kept = 0
    for start in range(0, len(exact), BATCH):
        ours, theirs = (np.concatenate(gaps[start : start + BATCH]) for gaps in (exact, cached))
        if len(ours):
            chosen = [scores >= np.quantile(scores, 1 - KEEP) for scores in (ours, theirs)]
            same, kept = same + int((chosen[0] & chosen[1]).sum()), kept + int(chosen[0].sum())
    return same / kept


def bench_adaspec(args):
    bench = Adaspec(args)
    ways = {way: [] for way in (LOOP, *args.schemes)}
    overlaps = {scheme: [] for scheme in args.schemes}
    first = next(iter(bench.stores.values()))
    for seed in range(args.drafts):
        loop = {"kind": "published", "target": str(bench.target)}
        reference, of_reference = bench.train("loop-ref", seed, first, **loop)
        draft, of_draft = bench.train("loop", seed, first, **loop, reference_model=str(reference))
        ways[LOOP].append((of_reference, of_draft, 0.0, bench.alpha(draft)))
        new = bench.folder / f"new-{seed}"
        exact = bench.exact_gaps([new, draft], reference)
        for number, (scheme, store) in enumerate(bench.stores.items()):
            cached_reference, of_reference = bench.train(f"cache{number}-ref", seed, store, kind="cache")
            scored_s = bench.add_losses(store, {f"ref{seed}": cached_reference})
            cached, of_draft = bench.train(
                f"cache{number}", seed, store, kind="cache", selection="adaspec", reference=f"ref{seed}"
            )
            ways[scheme].append((of_reference, of_draft, scored_s, bench.alpha(cached)))
            names = {f"same{seed}": reference, f"new{seed}": new, f"draft{seed}": draft}
            bench.add_losses(store, names)
            found = [bench.stored_gaps(scheme, f"{name}{seed}", f"same{seed}") for name in ("new", "draft")]
            overlaps[scheme].append([overlap(*pair) for pair in zip(exact, found, strict=True)])
        print("\n".join(["", *adaspec_lines(bench, ways, overlaps)]), flush=True)
    yield from adaspec_lines(bench, ways, overlaps)


def adaspec_lines(bench, ways, overlaps):
    def mean(values):
        values = list(values)
        spread = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
        return f"{statistics.mean(values):.2f} ± {spread:.2f}"

    drafts = len(ways[LOOP])
    began = "trained on the text" if bench.args.warm_start else "made anew"
    yield (
        f"## AdaSPEC, {drafts} drafts {began}, {bench.args.steps} steps each for reference and draft; entropy of the "
        f"target {bench.entropy:.1f} nats"
    )
    yield ""
    yield "| | alpha, sampled, % | less in one loop | greedy, % | ms a step, reference | draft | peak MiB, draft |"
    yield "|---|---|---|---|---|---|---|"
    for way, runs in ways.items():
        step = [statistics.median(s for run in runs for s in run[part]["steps_s"]) for part in (0, 1)]
        peak = max(run[1]["peak_bytes"] - run[1]["libraries_bytes"] for run in runs)
        alphas = [mean(100 * run[3][mode] for run in runs) for mode in ("sampled", "greedy")]
        lost = mean(100 * (b[3]["sampled"] - a[3]["sampled"]) for a, b in zip(ways[LOOP], runs, strict=True))
        name = way if way == LOOP else f"cache, {way.replace(' --', ', ')}"
        yield (
            f"| {name} | {alphas[0]} | {'' if way == LOOP else lost} | {alphas[1]} | {1e3 * step[0]:.0f} "
            f"| {1e3 * step[1]:.0f} | {peak / MIB:,.0f} |"
        )
    yield ""
    loop = ways[LOOP]
    spent = {way: [sum(part["train_s"] for part in run[:2]) + run[2] for run in runs] for way, runs in ways.items()}
    for scheme, shares in overlaps.items():
        early, late = ([100 * share[at] for share in shares] for at in (0, 1))
        steps = [statistics.median(s for run in runs for s in run[1]["steps_s"]) for runs in (loop, ways[scheme])]
        memory = [max(r[1]["peak_bytes"] - r[1]["libraries_bytes"] for r in runs) for runs in (loop, ways[scheme])]
        yield (
            f"- {scheme}: of the rows that whole distributions select, for the same draft and reference, it selects "
            f"{mean(early)} % before training and {mean(late)} % after; a step in one loop takes "
            f"{steps[0] / steps[1]:.2f} times its time and {memory[0] / memory[1]:.2f} times its memory"
        )
        for number in sorted({1, drafts}):
            ours = bench.dump_s[scheme] + sum(spent[scheme][:number])
            theirs = sum(spent[LOOP][:number])
            yield (
                f"  - {number} draft{'s' * (number > 1)} with references: {theirs:.0f} s in one loop, {ours:.0f} s "
                f"from the cache, its dump of {bench.dump_s[scheme]:.0f} s included: {theirs / ours:.2f} times"
            )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    step = commands.add_parser("step", help="against fine-tuning on the text")
    step.set_defaults(bench=bench_step, name="train_step")
    step.add_argument("--vocab_size", type=int, default=131072)
    step.add_argument("--hidden", type=int, default=256)
    step.add_argument("--layers", type=int, default=4)
    step.add_argument("--length", type=int, default=256, help="tokens of a document (default %(default)s)")
    step.add_argument("--batch", type=int, default=8, help="documents of a step (default %(default)s)")
    step.add_argument("--steps", type=int, default=9)
    step.add_argument("--rounds", type=int, default=3)
    step.add_argument("--bf16", action="store_true", help="mixed precision")
    adaspec = commands.add_parser("adaspec", help="against all models in one loop")
    adaspec.set_defaults(bench=bench_adaspec, name="train_adaspec")
    adaspec.add_argument("--drafts", type=int, default=5, help="seeds (default %(default)s)")
    adaspec.add_argument("--steps", type=int, default=300)
    adaspec.add_argument("--temperature", type=float, default=1.0, help="of the target (default %(default)s)")
    adaspec.add_argument("--warm_start", action="store_true", help="begin with drafts trained on the text")
    adaspec.add_argument("--schemes", nargs="+", default=SCHEMES, help="of the cache")
    for command in (step, adaspec):
        command.add_argument("--threads", type=int, default=os.cpu_count())
        command.add_argument("--record", action="store_true", help="write the table to benchmarks/results")
    args = parser.parse_args(argv)
    transformers.logging.disable_progress_bar()
    began = time.monotonic()
    lines = list(args.bench(args))
    print("\n".join(lines))
    if args.record:
        day = datetime.datetime.now(datetime.UTC).date()
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu-{os.cpu_count()}-cores"
        if args.name == "train_step":
            kind = f"v{args.vocab_size}_batch{args.batch}"
        else:
            kind = "warm" if args.warm_start else "new"
        name = f"{args.name}_{kind}"
        path = RESULTS / f"{name}_{device.replace(' ', '-').lower()}_{day}.md"
        path.write_text(
            f"# Training from the cache, {device}, {day}\n\nPython {platform.python_version()}, torch "
            f"{torch.__version__}, transformers {transformers.__version__}; shared machine, "
            f"{time.monotonic() - began:,.0f} s.\n\n"
            f"    python -m benchmarks.bench_train {shlex.join(sys.argv[1:])}\n\n" + "\n".join(lines) + "\n"
        )


if __name__ == "__main__":
    main()
