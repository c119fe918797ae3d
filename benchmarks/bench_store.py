"""Bytes, fidelity and speed of stored rows, for each scheme and for other formats, on the same rows in one run.

    python -m benchmarks._distributions demo mid large      trains the targets once, in 24 minutes
    python -m benchmarks.bench_store [--distributions demo mid large --temperatures 1 0.6] [--record]
    python -m benchmarks.bench_store codes     size of codes by order of ids, codebook and settings of Blosc
    python -m benchmarks.bench_store all       both

Bytes are those of whole stored shards without the tokens, which every format needs and which have their own line.
Fidelity compares the rows that training uses with the exact distribution (_measures.py). Encoding starts from entries
in memory, because the GPU chooses them, and ends with bytes. Decoding starts from bytes and ends with the input of a
training step: int64 ids and float32 probabilities or logprobs as rectangles. Rows/s are per second of one core. Other
formats are re-implemented from their descriptions (_formats.py).
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import time
from pathlib import Path

from benchmarks._distributions import Distribution, Synthetic  # first, because it sets variables that torch reads
from tests.helpers.encoding import encode_rows

# isort: split
import numcodecs
import numpy as np
import pyarrow
import torch
import transformers
import zarr

from benchmarks import _codes
from benchmarks._formats import Drawn, ParquetLists, RawNumPy, RsKd, Top, distillkit
from benchmarks._measures import Exact, Seen, angle, compare
from benchmarks._ngrams import NGramDistribution
from benchmarks._ours import BATCH_ROWS, Ours, token_bytes
from logitstore.rows import codec
from logitstore.rows.rows import Rows

RESULTS = Path(__file__).parent / "results"
SCHEMES = [
    ("topk", {"k": 64}), ("topk", {"k": 20}), ("nucleus", {"k": 64, "mass": 0.98}),
    ("nucleus", {"k": 64, "mass": 0.95}), ("sample", {"num_draws": 50}),
    ("hybrid", {"num_draws": 20}), ("hybrid", {"num_draws": 32}), ("hybrid", {"num_draws": 50}),
    ("hybrid", {"num_draws": 100}),
]  # fmt: skip
TOP = 128
ROWS_PER_CHUNK = 256
DOCUMENT_ROWS = 128
"""Positions per Parquet row of DistillKit, whose reader expects documents."""
YARDSTICK = "DistillKit top-64 bf16"
NOTES = f"""
kl_codes: nats that rounding loses, in the kept entries and the tail. kl_tail: nats lost in the tail, where it is one
bucket that is spread evenly over the tokens not kept, KL(p, stored), or -log of the kept mass where it is dropped,
KL(stored, p), the other being infinite: no two of these kinds compare. tv: half the L1 distance of a row's draws and p.
alpha error: mean over rows of |estimate of sum min(p, q) - the exact sum|; bias: the difference of their means. Angles,
degrees: between the gradient by the logits of full distillation and of training on what is stored, of a row, summed
over {ROWS_PER_CHUNK} rows, over all. The draft of a Llama is the target after a third of its training, that of the
n-grams knows two tokens of context and is flatter. DistillKit, Parquet and NumPy: trained on renormalised, as those who
use them do; their alpha gets what they leave as a tail bucket. RS-KD's is sum min(draws / n, q). of DistillKit: B/row
over those of {YARDSTICK}, in Parquet as it writes it.
"""


class Measured:
    """Sums of the losses of one format."""

    def __init__(self, name, *, is_ours=False):
        self.name, self.is_ours, self.rows, self.sums, self.angles = name, is_ours, 0, {}, []
        self.gradient = self.wanted = 0.0
        self.bytes, self.note = 0.0, ""
        self.encode = self.decode = float("nan")

    def add(self, exact, seen):
        """Adds some rows."""
        values, gradient = compare(exact, seen)
        wanted = exact.gradient()
        self.angles.append(angle(gradient, wanted))
        self.gradient, self.wanted = self.gradient + gradient, self.wanted + wanted
        self.rows += len(seen.weights)
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.sum().item()

    def mean(self, name):
        """Returns the mean over rows; None if the measure does not apply."""
        return self.sums[name] / self.rows if name in self.sums else None


def measure(source, args):
    """Measures all formats on the rows of a distribution.

    Returns:
        The measurements of the formats, the figures of the distribution, and our schemes with their arrays.
    """
    ours = [Ours.of(scheme, options, source.vocab_size, args.rows) for scheme, options in SCHEMES]
    others = [*distillkit(source.vocab_size), ParquetLists(k=64), ParquetLists(k=20), RawNumPy()]
    others = [] if args.what == "codes" else others
    rskd = RsKd()
    measured = {each.name: Measured(each.name, is_ours=each in ours) for each in (*ours, *others, rskd)}
    tops, sums, done = [], {}, 0
    for chunk in source.chunks(args.rows, ROWS_PER_CHUNK):
        exact = Exact.of(chunk.logprobs, chunk.draft)
        values, token_ids = chunk.logprobs.topk(TOP, dim=-1)
        tops.append(Top(token_ids.numpy(), values.numpy()))
        for name, value in describe(exact, chunk, values).items():
            sums[name] = sums.get(name, 0.0) + value.sum(dtype=torch.float64).item()
        for one in ours:
            rows = codec.decode(one.keep(chunk, done), one.spec)
            if args.what == "codes":
                continue
            measured[one.name].add(exact, Seen.of_rows(rows, 0, len(rows)))
            if one.spec.scheme.name == "sample" and source.vocab_size <= 2**17:
                measured[rskd.name].add(exact, seen_of(rskd, drawn_of(one.parts[-1])))
        for one in others:
            found = one.decode(encoded(one, tops[-1]))
            measured[one.name].add(exact, Seen.of_truncated(*found))
        done += len(values)
    if done < args.rows:
        raise ValueError(f"rows must be at most the {done} that count, got rows={args.rows}")
    top = Top(*(np.concatenate(parts) for parts in zip(*tops, strict=True)))
    weigh(ours, others, rskd, top, measured)
    if args.timing_rows and args.what != "codes" and source.temperature == args.temperatures[0]:
        measure_speed(ours, others, rskd, top, measured, args)
    summary = {name: value / done for name, value in sums.items()}
    return [one for one in measured.values() if one.rows], summary, {one.name: one.arrays() for one in ours}


def describe(exact, chunk, top):
    masses = {f"top_{k}": top[:, :k].exp().sum(-1) for k in (1, 20, 64)}
    labels = chunk.labels[:, None]
    losses = {"loss": -chunk.logprobs.gather(1, labels), "draft_loss": -chunk.draft.gather(1, labels)}
    return {"entropy": exact.entropy, "alpha": exact.alpha, **losses, **masses}


def encoded(one, top):
    if not hasattr(one, "exact_k"):
        return one.encode(top)
    full, rest = divmod(len(top.token_ids), DOCUMENT_ROWS)
    return one.encode(top, [DOCUMENT_ROWS] * full + [rest] * (rest > 0))


def drawn_of(arrays):
    counts = arrays["counts"].astype(np.int64)
    return Drawn(counts, codec.ungap(arrays["gaps"], counts), arrays["draws"].astype(np.int64))


def seen_of(rskd, drawn):
    """Returns the rows of RS-KD's reader as a rectangle."""
    counts, token_ids, draws = rskd.decode(rskd.encode(drawn), len(drawn.counts))
    num_draws = int(draws[: counts[0]].sum())
    numbers = np.zeros(len(counts), np.float32)
    rows = Rows(
        counts=counts, token_ids=token_ids, logprobs=np.log(draws / num_draws), weights=None, tail_mass=numbers,
        label_logprob=numbers, entropy=numbers,
    )  # fmt: skip
    padded = rows.padded(np.arange(len(counts)))
    return Seen(
        kind="drawn", token_ids=torch.from_numpy(padded.token_ids), weights=torch.from_numpy(padded.probs).double(),
        probs=None, tail=torch.zeros(len(counts), dtype=torch.float64),
    )  # fmt: skip


def weigh(ours, others, rskd, top, measured):
    """Computes the bytes of whole shards."""
    num_rows = len(top.token_ids)
    for one in ours:
        parts = {name: len(data or b"") / num_rows for name, data in one.encode(one.arrays()).items()}
        measured[one.name].bytes = sum(parts.values())
        measured[one.name].note = ", ".join(f"{name} {size:.1f}" for name, size in parts.items() if size)
        if one.spec.scheme.name == "sample" and measured[rskd.name].rows:
            measured[rskd.name].bytes = len(rskd.encode(drawn_of(one.arrays()))) / num_rows
    for one in others:
        measured[one.name].bytes = len(encoded(one, top)) / num_rows
        if hasattr(one, "payload_bytes"):
            measured[one.name].note = f"{one.payload_bytes} before Parquet"


def measure_speed(ours, others, rskd, top, measured, args):
    """Measures rows/s of encoding and decoding on one core. The same rows are repeated to get more of them."""
    torch.set_num_threads(1)
    numcodecs.blosc.set_nthreads(1)
    times = -(-args.timing_rows // len(top.token_ids))
    num_rows = times * len(top.token_ids)
    tiled = Top(*(np.tile(part, (times, 1)) for part in top))
    for one in ours:
        arrays = {name: np.tile(values, times) for name, values in one.arrays().items()}
        rows, held, found = codec.decode(arrays, one.spec), one.encode(arrays), measured[one.name]
        found.encode = num_rows / best(lambda one=one, rows=rows: one.encode(encode_rows(rows, one.spec)))
        found.decode = num_rows / best(lambda one=one, held=held, counts=arrays["counts"]: one.decode(held, counts))
        if one.spec.scheme.name == "sample" and measured[rskd.name].rows:
            drawn, found = drawn_of(arrays), measured[rskd.name]
            data = rskd.encode(drawn)
            found.encode = num_rows / best(lambda drawn=drawn: rskd.encode(drawn))
            found.decode = num_rows / best(lambda data=data, counts=drawn.counts: read_rskd(rskd, data, counts))
    for one in others:
        data, found = encoded(one, tiled), measured[one.name]
        found.encode = num_rows / best(lambda one=one: encoded(one, tiled))
        found.decode = num_rows / best(lambda one=one, data=data: one.decode(data))
    torch.set_num_threads(args.threads)


def read_rskd(rskd, data, counts):
    drawn = rskd.decode(data, len(counts))
    weights = drawn.draws.astype(np.float32)
    rows = Rows(
        counts=drawn.counts, token_ids=drawn.token_ids, logprobs=weights, weights=weights, tail_mass=weights,
        label_logprob=weights, entropy=weights,
    )  # fmt: skip
    for start in range(0, len(counts), BATCH_ROWS):
        rows.padded(np.arange(start, min(start + BATCH_ROWS, len(counts))))


def best(run, rounds=2):
    """Returns the CPU seconds of all threads of this process, without other work on the machine."""
    taken = []
    for _ in range(rounds):
        started = time.process_time()
        run()
        taken.append(time.process_time() - started)
    return min(taken)


def table(found):
    """Returns lines of a Markdown table."""
    columns = (
        "format", "B/row", "of DistillKit", "entries/row", "mass", "kl_codes", "kl_tail", "tv", "alpha error",
        "alpha bias", "angle/row", f"angle/{ROWS_PER_CHUNK} rows", "angle, all", "encode rows/s", "decode rows/s",
        "bytes of",
    )  # fmt: skip
    yardstick = next(one for one in found if one.name == YARDSTICK)
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for one in found:
        bias = one.mean("alpha") - one.mean("alpha_exact")
        cells = [
            one.name, f"{one.bytes:.1f}", f"{one.bytes / yardstick.bytes:.3f}", f"{one.mean('entries'):.1f}",
            f"{one.mean('mass'):.4f}", number(one.mean("kl_codes"), ".1e"), number(one.mean("kl_tail"), ".1e"),
            number(one.mean("tv"), ".3f"), f"{one.mean('alpha_error'):.1e}", f"{bias:+.1e}",
            f"{one.mean('angle_row'):.2f}", f"{np.mean(one.angles):.2f}", f"{angle(one.gradient, one.wanted):.2f}",
            number(one.encode, ".3g"), number(one.decode, ".3g"), one.note,
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, "", *verdicts([one for one in found if one.is_ours], yardstick)]


def verdicts(ours, yardstick):
    """Returns lines that name our smallest scheme which is no worse than another format."""
    of_rows = {"alpha of a row": lambda one: one.mean("alpha_error")}
    of_rows["the gradient of a row"] = lambda one: one.mean("angle_row")
    of_many = {"mean alpha": lambda one: abs(one.mean("alpha") - one.mean("alpha_exact"))}
    of_many[f"the gradient of {ROWS_PER_CHUNK} rows"] = lambda one: np.mean(one.angles)
    of_many["that of all"] = lambda one: angle(one.gradient, one.wanted)
    for measures in (of_rows | of_many, of_many):
        fine = [one for one in ours if all(measure(one) <= 1.01 * measure(yardstick) for measure in measures.values())]
        line = f"No worse than {yardstick.name} in {', '.join(measures)}: "
        if fine:
            least = min(fine, key=lambda one: one.bytes)
            ratios = f"{least.bytes / yardstick.bytes:.3f} of its {yardstick.bytes:.1f} B, or of {yardstick.note}"
            line += f"{least.name}, {least.bytes:.1f} B/row, {ratios}."
        yield line if fine else f"{line}none."
        yield ""


def number(value, form):
    return "" if value is None or np.isnan(value) else f"{value:{form}}"


def title(source, summary, args):
    is_made_up = isinstance(source, Synthetic)
    kind = "no text" if is_made_up else f"temperature {source.temperature:g}, {source.text.replace('_', ' ')} text"
    facts = ", ".join(f"{name} {value:.3f}" for name, value in summary.items())
    made = f" Trained for {source.made['minutes']:.1f} minutes," if isinstance(source, Distribution) else ""
    made += f" {source.made['epochs']:.1f} epochs of {source.made['tokens']} tokens." if made else ""
    return [f"## {source.name}, V = {source.vocab_size}, {kind}", "", f"{args.rows} rows: {facts}.{made}"]


def run(args):
    """Yields lines of the report."""
    for source in sources(args):
        started = time.perf_counter()
        found, summary, arrays = measure(source, args)
        yield from title(source, summary, args)
        if not isinstance(source, Synthetic):
            per_row, tokens = token_bytes(source, args.rows)
            yield f"Tokens beside: {per_row:.1f} B for each row that counts, {tokens:.2f} tokens to one."
        yield ""
        if args.what != "codes":
            yield from table(found)
            yield ""
        if args.what != "formats":
            yield from _codes.report(source, arrays, args.rows)
        print(f"{source.name}: {time.perf_counter() - started:.0f} s", flush=True)


def sources(args):
    for name in args.distributions:
        if name == "synthetic":
            yield Synthetic(vocab_size=262144)
        elif name == "ngrams":
            yield from (NGramDistribution(temperature=each, text=args.text) for each in args.temperatures)
        else:
            yield from (Distribution(name=name, temperature=each, text=args.text) for each in args.temperatures)


def heading(args):
    versions = {"torch": torch, "numpy": np, "zarr": zarr, "numcodecs": numcodecs, "pyarrow": pyarrow}
    told = ", ".join(f"{name} {module.__version__}" for name, module in versions.items())
    given = {name: value if isinstance(value, list) else [value] for name, value in vars(args).items()}
    command = " ".join(f"--{n} {' '.join(map(str, v))}" for n, v in given.items() if n not in ("what", "record"))
    return [
        f"# stored rows, {args.what}, CPU, {datetime.date.today()}", "",
        f"{platform.machine()}, {os.cpu_count()} shared cores, rows/s are for each second of one; load "
        f"{os.getloadavg()[0]:.1f}; Python {platform.python_version()}, {told}.", "",
        f"    python -m benchmarks.bench_store {args.what} {command}", NOTES,
    ]  # fmt: skip


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("formats", "codes", "all"), default="formats")
    parser.add_argument("--distributions", nargs="+", default=["demo", "mid", "large", "ngrams"],
                        help="also: synthetic")  # fmt: skip
    parser.add_argument("--temperatures", nargs="+", type=float, default=[1.0, 0.6])
    parser.add_argument("--text", choices=("held_out", "seen"), default="held_out", help="was the target trained on it")
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--timing_rows", type=int, default=32768, help="timed, at the first temperature; 0: none")
    parser.add_argument("--threads", type=int, default=2, help="not of what is timed")
    parser.add_argument("--record", action="store_true", help=f"writes {RESULTS.name}/ too")
    args = parser.parse_args(argv)
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    kind = "codes" if args.what == "codes" else "store"
    path = RESULTS / f"{kind}_cpu-{os.cpu_count()}-cores_{datetime.date.today()}.md"
    lines = heading(args)
    for line in run(args):
        print(line, flush=True)
        lines.append(line)
        if args.record:  # written after each part, so that an interrupted run leaves a record
            path.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
