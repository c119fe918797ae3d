"""Quality of drafts by scheme: drafts trained from each scheme, compared with training from whole distributions.

    python -m benchmarks.bench_scheme [--seeds 3] [--steps 400] [--schemes "topk --k 16" ...] [--record]
    python -m benchmarks.bench_scheme --temperature 0.6 --warm_start [--record]

A target is made once (benchmarks/_distributions.py, `demo`: 2,048 tokens, real text). jobs/dump_logits.py dumps it with
each scheme, and once with every token of the vocabulary kept. jobs/train_draft.py trains drafts from each store, with
the same initial weights, documents, order and steps; only the kept entries differ. `--temperature` below 1 makes the
target's distributions as peaked as those of large models. Drafts start with random weights or, with `--warm_start`,
from a draft that was distilled from whole distributions of the target at temperature 1. Like a model that was already
trained on text, such a draft knows which tokens of the tail are likely.

Drafts are compared on held-out documents whose rows keep every token. There alpha is exact up to the codes:
teacher-forced, sum_v min(p, q). Differences to whole distributions are computed for each seed.

Bytes are those of all arrays of the `target` layer per row that counts. The selected set is that of AdaSPEC: the 40% of
the rows of the training documents with the largest loss gap between the untrained draft and a reference, computed from
each store. Its overlap with the set from whole distributions is the share of rows that both would train on.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import platform
import shlex
import shutil
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import _distributions

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import numpy as np
import torch
import transformers
from _demo import models
from _demo.corpus import write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

import logitstore
from logitstore.commands import dump as dump_command
from logitstore.inspection import info
from trainer.commands import train as train_command
from trainer.evaluation.from_cache import cached_acceptance

SCHEMES = (
    "topk --k 8", "topk --k 20", "topk --k 64", "nucleus --mass 0.9", "nucleus --mass 0.98",
    "sample --num_draws 12", "sample --num_draws 50", "hybrid --num_draws 12", "hybrid --num_draws 20",
    "hybrid --num_draws 32", "hybrid --num_draws 50", "hybrid --num_draws 100",
)  # fmt: skip
WHOLE = "topk --k 2048"
KEEP = 0.4
DOCUMENTS = shlex.split("--max_length 256 --shard_rows 16384")
TRAINING = shlex.split(
    "--per_device_train_batch_size 8 --learning_rate 5e-3 --lr_scheduler_type cosine --warmup_steps 20 "
    "--weight_decay 0.1 --adam_beta2 0.95 --logging_strategy no --save_strategy no --no_progress true"
)


@dataclass
class Outcome:
    """Results of one scheme."""

    bytes_per_row: float
    entries: float
    overlap: float = float("nan")
    """Overlap of AdaSPEC's selected set with the one from whole distributions."""
    alphas: list[float] = field(default_factory=list)
    """Alpha of the draft of each seed."""
    greedy: list[float] = field(default_factory=list)
    kls: list[float] = field(default_factory=list)


class Bench:
    """The common folder, target and text of all schemes."""

    def __init__(self, folder, *, seeds, steps, num_functions, temperature, warm_start):
        self.folder, self.seeds, self.steps = folder, seeds, steps
        self.target = _distributions.FOLDER / "demo" / "target"
        _distributions.make("demo", _distributions.RECIPES["demo"])
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name, held_out in (("train", False), ("held_out", True)):
            write_jsonl(folder / f"{name}.jsonl", _distributions.functions(held_out=held_out)[:num_functions])
        tokenizer = AutoTokenizer.from_pretrained(self.target)
        for seed in range(seeds):
            models.save_new_model(models.DRAFTS[0], tokenizer, folder / f"new-{seed}", seed=seed + 1)
        if warm_start:
            store = self._dump("train", WHOLE)
            for seed in range(seeds):
                made = self._train(store, seed, f"warm-{seed}")
                shutil.rmtree(folder / f"new-{seed}")
                made.rename(folder / f"new-{seed}")
            shutil.rmtree(store)
        if temperature != 1:
            self.target = _distributions.sharpen(self.target, folder / "target", temperature)
        self.check = self._dump("held_out", WHOLE)
        self.entropy = np.nanmean([np.nanmean(document.rows.entropy) for document in logitstore.open(self.check)])

    def _dump(self, data, scheme):
        url = self.folder / f"{data} {scheme}".replace(" --", "_").replace(" ", "_")
        argv = ["--store", str(url), "--target", str(self.target), "--data", str(self.folder / f"{data}.jsonl")]
        self._job(dump_command.run, [*argv, *DOCUMENTS, "--no_progress", "--scheme", *scheme.split()])
        return url

    def _train(self, store, seed, name):
        folder = self.folder / name
        argv = ["--store", str(store), "--draft", str(self.folder / f"new-{seed}"), "--output_dir", str(folder)]
        self._job(train_command.run, [*argv, "--max_steps", str(self.steps), "--seed", str(seed), *TRAINING])
        return folder

    def _add_losses(self, store, reference):
        argv = ["--store", str(store), "--reference", f"new={self.folder / 'new-0'}", "--reference", f"ref={reference}"]
        self._job(dump_command.run, [*argv, "--no_progress"])
        gap = logitstore.open(store).gap("new", "ref")
        return np.concatenate([gap[i] for i in range(len(gap))])

    def _job(self, main, argv):
        with (self.folder / "log.txt").open("a") as log, contextlib.redirect_stdout(log):
            return main(argv)

    def outcome(self, scheme, gap_of_all, reference):
        """Dumps with a scheme, trains a draft for each seed, and compares."""
        store = self._dump("train", scheme)
        layer = info.describe(logitstore.open(store))["layers"]["target"]
        found = Outcome(sum(layer["bytes_per_row"].values()), layer["entries"] / layer["counted"])
        for seed in range(self.seeds):
            draft = AutoModelForCausalLM.from_pretrained(self._train(store, seed, f"draft {scheme} {seed}"))
            accepted = cached_acceptance(draft, logitstore.open(self.check))
            found.alphas.append(accepted.alpha_estimate)
            found.greedy.append(accepted.argmax_agreement)
            found.kls.append(accepted.forward_kl)
        gap = self._add_losses(store, reference or self.folder / f"draft {scheme} 0")
        if gap_of_all is not None:
            found.overlap = overlap(gap_of_all, gap)
        return found, gap


def overlap(expected, found):
    """Returns the share of rows that are in both selected sets, the KEEP rows with the largest gaps."""
    there = np.isfinite(expected)
    num = round(KEEP * there.sum())
    chosen = [set(np.argsort(-gap[there], kind="stable")[:num].tolist()) for gap in (expected, found)]
    return len(chosen[0] & chosen[1]) / num


def rows(outcomes):
    """Returns the lines of the table, sorted by bytes per row."""
    whole = outcomes[WHOLE]
    yield "| scheme | bytes/row | entries | alpha, % | less than whole, points | greedy, % | KL, nats | overlap, % |"
    yield "|---|---|---|---|---|---|---|---|"
    for scheme, one in sorted(outcomes.items(), key=lambda item: item[1].bytes_per_row):
        lost = [100 * (b - a) for a, b in zip(one.alphas, whole.alphas, strict=True)]
        error = statistics.stdev(lost) / len(lost) ** 0.5 if len(lost) > 1 and one is not whole else 0.0
        yield (
            f"| {scheme.replace(' --', ', ')} | {one.bytes_per_row:.1f} | {one.entries:.1f} "
            f"| {100 * statistics.mean(one.alphas):.2f} | {statistics.mean(lost):+.2f} ± {error:.2f} "
            f"| {100 * statistics.mean(one.greedy):.2f} | {statistics.mean(one.kls):.4f} | {100 * one.overlap:.1f} |"
        )


def plot(outcomes, path):
    """Plots alpha over bytes per row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    whole = outcomes[WHOLE]
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for kind, marker in (("topk", "o"), ("nucleus", "s"), ("sample", "^"), ("hybrid", "D")):
        points = sorted(
            (one.bytes_per_row, [100 * (a - b) for a, b in zip(one.alphas, whole.alphas, strict=True)])
            for scheme, one in outcomes.items() if scheme.startswith(kind) and one is not whole
        )  # fmt: skip
        if points:
            x, lost = [p[0] for p in points], [p[1] for p in points]
            means, spread = [statistics.mean(y) for y in lost], [[statistics.mean(y) - min(y) for y in lost],
                                                               [max(y) - statistics.mean(y) for y in lost]]  # fmt: skip
            axes.errorbar(x, means, yerr=spread, marker=marker, label=kind, capsize=3)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.axhline(-0.2, color="grey", linestyle="--", linewidth=0.8)
    ticks = [10, 20, 30, 40, 60, 80, 100, 150, 200]
    axes.set(xscale="log", xlabel="bytes for each row that counts", ylabel="alpha - alpha from whole rows, points")
    axes.set(xticks=ticks, xticklabels=ticks, xlim=(10, 200))
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path, dpi=120)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400, help="of each draft (default %(default)s)")
    parser.add_argument("--num_functions", type=int, default=100_000, help="documents at most")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the target (default %(default)s)")
    parser.add_argument("--warm_start", action="store_true", help="begin with what was distilled at temperature 1")
    parser.add_argument("--schemes", nargs="+", default=SCHEMES, metavar="'NAME --OPTION VALUE'")
    parser.add_argument("--record", action="store_true", help="write the table and the plot to benchmarks/results")
    args = parser.parse_args(argv)
    transformers.logging.disable_progress_bar()
    started = time.monotonic()
    start = "_warm" if args.warm_start else ""
    bench = Bench(
        _distributions.FOLDER / f"scheme{start}", seeds=args.seeds, steps=args.steps, num_functions=args.num_functions,
        temperature=args.temperature, warm_start=args.warm_start,
    )  # fmt: skip
    outcomes = {}
    outcomes[WHOLE], gap = bench.outcome(WHOLE, None, None)
    outcomes[WHOLE].overlap = 1.0
    reference = bench.folder / f"draft {WHOLE} 0"
    for scheme in args.schemes:
        outcomes[scheme], _ = bench.outcome(scheme, gap, reference)
        print("\n".join(rows(outcomes)), flush=True)
    begun = AutoModelForCausalLM.from_pretrained(bench.folder / "new-0")
    before = cached_acceptance(begun, logitstore.open(bench.check)).alpha_estimate
    facts = f"target's entropy {bench.entropy:.2f} nats; alpha of the first draft before training {100 * before:.2f}"
    taken = f"{args.seeds} seeds, {args.steps} steps, {time.monotonic() - started:,.0f} s"
    lines = [*rows(outcomes), "", f"{taken}; {facts}"]
    print("\n".join(lines))
    if args.record:
        day = datetime.datetime.now(datetime.UTC).date()
        path = Path(__file__).parent / "results" / f"scheme{start}_cpu-{os.cpu_count()}-cores_{day}.md"
        plot(outcomes, path.with_suffix(".png"))
        head = (
            f"# Drafts trained from each scheme, CPU, {day}\n\n{os.cpu_count()} shared x86-64 cores; Python "
            f"{platform.python_version()}, torch {torch.__version__}.\n\n    python -m benchmarks.bench_scheme "
            f"{shlex.join(sys.argv[1:])}\n\n"
        )
        path.write_text(head + "\n".join(lines) + f"\n\n![alpha by bytes]({path.with_suffix('.png').name})\n")


if __name__ == "__main__":
    main()
