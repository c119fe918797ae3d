"""The plot of `logitstore fidelity`: what a row costs, and what it keeps. matplotlib, loaded only to draw."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from logitstore.inspection.fidelity_report import SMALLEST_BYTES

SUFFIXES = (".png", ".svg")
COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#9498a0", "#a463f2")
"""One for each array, told apart by readers with any colour vision when side by side."""


def check(path: str) -> None:
    """Raises ValueError if a plot cannot be drawn to a file."""
    if Path(path).suffix.lower() not in SUFFIXES:
        raise ValueError(f"plot must be a file that ends in .png or .svg, got plot={path}")
    if not Path(path).resolve().parent.is_dir():
        raise ValueError(f"plot must be a file in a folder that is there, got plot={path}; make the folder first")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(f"plot must have matplotlib to draw with, got plot={path}; pip install 'logitstore[plot]'")


def draw(facts: dict[str, Any], path: str) -> None:
    """Draws what `fidelity.describe` collected, to a file that `check` lets pass.

    Left the bytes of a row by array, as one stacked bar; right how many rows keep how much of their mass.
    """
    # Not pyplot: no window is wanted, and no state stays behind.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    figure.suptitle(f"{Path(facts['url']).name}: {facts['scheme']}", fontsize=11)
    left, right = figure.subplots(1, 2, width_ratios=(1, 2))
    _bytes(left, facts["bytes_per_row"])
    _mass(right, facts["kept_mass"])
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise ValueError(f"plot must be a file that can be written, got plot={path} ({error.strerror})") from error


def _bytes(axes: Any, sizes: dict[str, float]) -> None:  # noqa: ANN401
    bottom = 0.0
    for (name, size), colour in zip(sizes.items(), COLOURS, strict=True):
        if size >= SMALLEST_BYTES:
            axes.bar([0], [size], bottom=bottom, width=0.6, color=colour, label=f"{name}  {size:.2f}")
        bottom += size
    axes.set_xlim(-0.5, 0.5)
    axes.set_xticks([])
    axes.set_ylabel("bytes")
    axes.set_title(f"{bottom:.1f} bytes a counted row", fontsize=10)
    handles, labels = axes.get_legend_handles_labels()
    # In the order of the bar, and beside it: the thinnest slices have no room for words.
    axes.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _mass(axes: Any, mass: dict[str, Any]) -> None:  # noqa: ANN401
    axes.set_xlabel("kept mass of a row")
    axes.set_ylabel(f"share of {mass['rows']:,} rows of {mass['shards']:,} of {mass['shards_committed']:,} shards")
    axes.spines[["top", "right"]].set_visible(False)
    if not mass["rows"]:
        axes.set_title("no rows", fontsize=10)
        return
    edges, rows = mass["bins"]["edges"], mass["bins"]["rows"]
    shares = [count / mass["rows"] for count in rows]
    axes.bar(edges[:-1], shares, width=edges[1] - edges[0], align="edge", color="#4269d0")
    for name, value, style in (("mean", mass["mean"], "-"), ("1st percentile", mass["percentile_1"], ":")):
        axes.axvline(value, color="#222222", linestyle=style, linewidth=1.2, label=f"{name} {value:.4f}")
    axes.set_xlim(edges[0], edges[-1])
    # Above the bars: within, the lines would cross it.
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2, frameon=False, fontsize=8)
