"""Report at the end of the demo: a table of acceptance rates, and differences between methods with standard errors."""

from __future__ import annotations

import math
from typing import Any

DISTILLATION, RANDOM, ADASPEC = ("distillation", "random 40 %", "AdaSPEC 40 %")
"""Names of the methods in the table."""

CACHED = {"greedy": "argmax_agreement", "sampled": "alpha_estimate"}
"""For each decoding mode, the name of the figure from the cache that estimates the measured alpha of that mode."""

HEAD = ("draft", "method", "greedy", "sampled", "tau greedy", "tau sampled", "sampled, lower..upper", "greedy")
"""Column titles. The groups after `method` are alpha measured, tau measured, and alpha from the cache."""


def report(results: dict[str, Any]) -> list[str]:
    """Returns the lines of the report.

    Args:
        results: The results that `jobs/demo.py` writes to results.json.
    """
    drafts, target, dumps = results["drafts"], results["target"], results["dump"]
    first = drafts[0]["evaluation"]
    dump, held_out = dumps["train"], dumps["held_out"]
    bytes_per_row = dump["bytes_per_counted_row"]["target"]
    speeds = {d["draft"]: d["training"]["rows_per_second"] for d in reversed(drafts)}
    greedy, sampled = (first["measured"][mode] for mode in ("greedy", "sampled"))
    return [
        "",
        *_table(drafts),
        "",
        f"alpha: accepted / (accepted + calls with a rejection), over {greedy['prompts']} held-out prompts, gamma "
        f"{first['gamma']}, at most {greedy['max_new_tokens']} new tokens;",
        f"  one standard error is about {100 * _error(greedy):.1f} points greedy, {100 * _error(sampled):.1f} sampled. "
        "tau: tokens per target call.",
        f"from the cache: teacher-forced, over {first['cached']['rows']:,} rows of {held_out['documents']} held-out "
        "documents; bounds of the sampled alpha,",
        "  and argmax agreement.",
        "",
        *_verdicts(drafts),
        "",
        f"store       {bytes_per_row:.1f} bytes a row ({dump['entries'] / dump['counted_rows']:.1f} entries), "
        f"{dump['counted_rows']:,} of {dump['store_rows']:,} rows have loss mask 1",
        f"dump        {dump['rows_per_second']:,.0f} rows/s (including the start of the actors)",
        "training    " + ", ".join(f"{name} {speed:,.0f} rows/s" for name, speed in reversed(speeds.items()))
        + f" (plain distillation), {drafts[0]['training']['steps']:.0f} steps for every draft and method",
        f"target      {target['parameters'] / 1e6:.2f} M parameters, {target['target_nll']:.2f} nats a held-out token; "
        f"unigram {target['unigram_nll']:.2f}",
        f"time        {results['seconds']['total']:.0f} s: "
        + ", ".join(f"{name} {s:.0f}" for name, s in results["seconds"].items() if name != "total"),
    ]  # fmt: skip


def _table(drafts: list[dict[str, Any]]) -> list[str]:
    rows = []
    for draft in drafts:
        measured, cached = draft["evaluation"]["measured"], draft["evaluation"]["cached"]
        rows.append(
            (
                f"{draft['draft']} {draft['parameters'] / 1e6:.2f} M",
                draft["method"],
                *(f"{measured[mode]['alpha']:.3f}" for mode in ("greedy", "sampled")),
                *(f"{measured[mode]['tau']:.2f}" for mode in ("greedy", "sampled")),
                f"{cached['alpha_lower']:.3f}..{cached['alpha_upper']:.3f}",
                f"{cached['argmax_agreement']:.3f}",
            )
        )
    widths = [max(len(row[i]) for row in (HEAD, *rows)) for i in range(len(HEAD))]
    groups = (("", 2), ("alpha measured", 2), ("tau measured", 2), ("alpha from the cache", 2))
    spans, column = [], 0
    for title, count in groups:
        spans.append(title.center(sum(widths[column : column + count]) + 2 * (count - 1)))
        column += count
    lines = ["  ".join(spans).rstrip()]
    for row in (HEAD, *rows):
        cells = [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells))
    lines.insert(2, "  ".join("-" * width for width in widths))
    return lines


def _verdicts(drafts: list[dict[str, Any]]) -> list[str]:
    """Returns the lines that compare AdaSPEC with distillation and with random rows."""
    by_size: dict[str, dict[str, dict[str, Any]]] = {}
    for draft in drafts:
        by_size.setdefault(draft["draft"], {})[draft["method"]] = draft["evaluation"]
    lines = ["AdaSPEC minus distillation, in points of alpha:"]
    ahead = dict.fromkeys((DISTILLATION, RANDOM), 0)
    for name, methods in by_size.items():
        ours = methods[ADASPEC]
        for other in ahead:
            ahead[other] += sum(a > b for a, b in zip(_alphas(ours), _alphas(methods[other]), strict=True))
        measured, cached = [], []
        plain = methods[DISTILLATION]
        for mode, key in CACHED.items():
            a, b = (evaluation["measured"][mode] for evaluation in (ours, plain))
            error = math.hypot(_error(a), _error(b))
            measured.append(f"{mode} {100 * (a['alpha'] - b['alpha']):+.1f} ± {100 * error:.1f}")
            cached.append(f"{mode} {100 * (ours['cached'][key] - plain['cached'][key]):+.1f}")
        lines.append(f"  {name:<6} measured {', '.join(measured)}; from the cache {', '.join(cached)}")
    total = len(by_size) * 2 * len(CACHED)
    lines += [
        f"AdaSPEC is ahead of distillation in {ahead[DISTILLATION]} and of random rows in {ahead[RANDOM]} of these "
        f"{total} comparisons. Steps are equal:",
        "distillation learns from every row of its batches, the other two from 40 % of them.",
    ]
    return lines


def _alphas(evaluation: dict[str, Any]) -> list[float]:
    measured = [evaluation["measured"][mode]["alpha"] for mode in CACHED]
    return measured + [evaluation["cached"][key] for key in CACHED.values()]


def _error(result: dict[str, Any]) -> float:
    """Returns the standard error of a measured alpha, computed as if all counted tokens were independent."""
    looked_at = result["accepted"] + result["rejections"]
    return math.sqrt(result["alpha"] * (1.0 - result["alpha"]) / looked_at)
