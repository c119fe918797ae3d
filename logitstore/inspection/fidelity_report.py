"""What `logitstore fidelity` shows: how true a store is to the distributions that it was made from. NumPy only.

Numbers that need the exact distributions were measured when the store was dumped, and are in the commit records; the
rest is read off the store. What each one means: docs/fidelity.md.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from logitstore.errors import LayerNotFoundError
from logitstore.format import schemes
from logitstore.format.layout import layer_arrays
from logitstore.inspection import calibration_error
from logitstore.inspection.measured import Measured, evenly_spaced, read_measured
from logitstore.inspection.verify import places
from logitstore.rows.codec import LARGEST_TAIL

if TYPE_CHECKING:
    from collections.abc import Iterator

    from logitstore.format.spec import TargetSpec
    from logitstore.store.catalog import Layer
    from logitstore.store.reader import Store

TAIL_SHARDS = 8
"""Shards whose tails are read for the distribution of the kept mass."""
CALIBRATED_SHARDS = 2
"""Shards whose entries are read for the calibration of the likeliest token."""
NUM_BINS = 40
SMALLEST_BYTES = 0.005
"""Of a row: what costs less is shown as 0.00, or not at all."""

DIVERGENCES = {
    "kl_codes": "KL of rounding to codes",
    "kl_tail": "KL within the tail",
    "kl_renormalised": "KL if the tail were dropped",
    "tv_draws": "total variation of the draws",
    "control_kl": "KL of the target run twice",
    "control_tv": "total variation, run twice",
}
"""What a row loses, and for comparison what the target itself is unsure of, as people read it."""
OF_A_LOST_TAIL = ("kl_tail", "kl_renormalised")
"""Those that mean nothing to who reads draws: they stand for the tail too."""

LOSSES = {
    "alpha": ("alpha, exact", ""),
    "alpha_estimate": ("alpha, from the store", ""),
    "alpha_error": ("alpha, mean error of a row", ""),
    "angle_row": ("angle of a row's gradient", " degrees"),
    "angle_shard": ("angle of a shard's gradient", " degrees"),
}
"""What is off when a model is trained or scored on what is stored."""


def describe(store: Store, *, sample: float = 1.0, seed: int = 0) -> dict[str, Any]:
    """Collects what there is to show, as JSON values.

    Args:
        store: With a target layer, finished or not.
        sample: Share of each layer's shards that are looked at, in (0, 1]. Of these all records are read, and the
            values of a few.
        seed: Which shards those are.

    Raises:
        ValueError: `sample` is out of range.
        LayerNotFoundError: There is no target layer, or nothing of it yet.
        DamagedShardError: A shard that is read is not as committed.
    """
    chosen = places(store, sample, seed)
    target = store.spec.target
    if target is None:
        raise LayerNotFoundError(f"store must have target rows, got {store.url} without; dump the target first")
    shards = {name: [shard for of, shard in chosen if of == name] for name in store.layers}
    if not shards["target"]:
        raise LayerNotFoundError(f"store must have target rows, got {store.url} with none written yet; finish the dump")
    return {
        "url": store.url,
        "scheme": schemes.describe(target.scheme),
        "tail_is_lost": not target.scheme.draws,
        "bytes_per_row": _bytes_per_row(store, store.layers["target"]),
        "entries_per_row": _entries_per_row(store.layers["target"]),
        "kept_mass": _kept_mass(store, shards["target"]),
        "calibration": _calibration(store, target, shards["target"]),
        "layers": {
            name: _measured(store, layer, shards[name]) for name, layer in store.layers.items() if name != "tokens"
        },
    }


def _measured(store: Store, layer: Layer, shards: list[int]) -> dict[str, Any]:
    found = read_measured(store, layer.name, shards)
    return {
        "shards": len(shards),
        "shards_measured": found.shards,
        "shards_committed": _num_committed(store, layer),
        "rows": int(found.sums.get("rows", 0)),
        "control_rows": int(found.sums.get("control_rows", 0)),
        "means": found.means(),
    }


def _num_committed(store: Store, layer: Layer) -> int:
    return len(layer.index.upto(store.spec.num_shards))


def _bytes_per_row(store: Store, layer: Layer) -> dict[str, float]:
    counted = int(layer.index.upto(store.spec.num_shards).counted.sum())
    sizes = {array.name: store.storage.num_bytes(f"target/{array.name}") for array in layer_arrays("target")}
    return {name: round(size / counted, 3) if counted else 0.0 for name, size in sizes.items()}


def _entries_per_row(layer: Layer) -> float:
    counted = int(layer.index.counted.sum())
    return round(int(layer.index.entries.sum()) / counted, 3) if counted else 0.0


def _kept_mass(store: Store, shards: list[int]) -> dict[str, Any]:
    """Reads what the rows of a few of these shards keep."""
    read = _some(store, shards, TAIL_SHARDS)
    of = {"shards": len(read), "shards_committed": _num_committed(store, store.layers["target"])}
    tails = [store.reader.read_arrays("target", shard)["tail"] for shard in read]
    tail = np.concatenate([np.zeros(0, dtype=np.float32), *tails])
    kept = np.sort(1.0 - np.minimum(np.exp(tail[~np.isnan(tail)].astype(np.float64)), LARGEST_TAIL))
    if not len(kept):
        return {**of, "rows": 0}
    # The least of it as a round number, so that the bins mean something.
    first = min(math.floor(kept[0] * 20) / 20, 0.95)
    rows, edges = np.histogram(kept, bins=NUM_BINS, range=(first, 1.0))
    return {
        **of,
        "rows": len(kept),
        "mean": float(kept.mean()),
        "percentile_1": float(np.percentile(kept, 1)),
        "median": float(np.median(kept)),
        "bins": {"edges": edges.round(6).tolist(), "rows": rows.tolist()},
    }


def _calibration(store: Store, target: TargetSpec, shards: list[int]) -> dict[str, Any]:
    """Measures it where the likeliest token is sure to be kept, and what is kept is p."""
    if target.scheme.draws:
        return {"rows": 0}
    read = _some(store, shards, CALIBRATED_SHARDS)
    return {"shards": len(read), **calibration_error.measure(store, read)}


def _some(store: Store, shards: list[int], most: int) -> list[int]:
    """Returns a few of these shards, evenly over them, but for those whose target rows cannot be read."""
    layer = store.layers["target"]
    useless = layer.stale | layer.index.contested
    return evenly_spaced([shard for shard in shards if shard not in useless], most)


def render(facts: dict[str, Any]) -> Iterator[str]:
    """Writes what `describe` collected as a table for people."""
    yield f"{facts['url']}: {facts['scheme']}; {facts['entries_per_row']:.1f} entries on average"
    yield ""
    total = sum(facts["bytes_per_row"].values())
    yield _line("bytes a counted row", f"{total:.2f}")
    for name, size in facts["bytes_per_row"].items():
        if size >= SMALLEST_BYTES:
            yield _line(f"  {name}", f"{size:.2f}", f"{100 * size / total:.0f}%")
    mass = facts["kept_mass"]
    if mass["rows"]:
        yield _line("kept mass, mean", f"{mass['mean']:.4f}", _of(mass["rows"], mass["shards"], mass))
        yield _line("kept mass, 1st percentile", f"{mass['percentile_1']:.4f}")
    if (found := facts["calibration"])["rows"]:
        of = f"{_of(found['rows'], found['shards'], mass)}, {100 * found['accuracy']:.1f}% right"
        yield _line("calibration error of the likeliest (ece)", f"{found['ece']:.4f}", of)
        yield _line("  if the tail were dropped", f"{found['ece_renormalised']:.4f}")
    if not facts["tail_is_lost"]:
        yield "  entries were drawn: they stand for the rest too"
    for name, layer in facts["layers"].items():
        yield ""
        if name == "target":
            yield from _render_target(layer, () if facts["tail_is_lost"] else OF_A_LOST_TAIL)
        else:
            yield from _render_losses(name, layer)


def _of(rows: int, shards: int, among: dict[str, Any]) -> str:
    return f"of {rows:,} rows in {shards:,} of {among['shards_committed']:,} shards"


def _render_target(layer: dict[str, Any], without: tuple[str, ...]) -> Iterator[str]:
    yield _head("target", layer)
    if layer["rows"]:
        yield "  mean of a row, nats or share"
        for name, text in DIVERGENCES.items():
            if name in layer["means"] and name not in without:
                yield _line(f"{text} ({name})", f"{layer['means'][name]:.3g}")


def _render_losses(name: str, layer: dict[str, Any]) -> Iterator[str]:
    yield _head(name, layer)
    for key, (text, unit) in LOSSES.items():
        if key in layer["means"]:
            digits = 1 if unit else 4
            yield _line(f"{text} ({key})", f"{layer['means'][key]:.{digits}f}", unit.strip())


def _head(name: str, layer: dict[str, Any]) -> str:
    committed = layer["shards_committed"]
    if not layer["rows"]:
        why = "" if name == "target" else ": the target was not run beside it"
        return f"{name}: nothing was measured in {layer['shards']:,} of {committed:,} shards{why}"
    some = f"{layer['rows']:,} rows of {layer['shards_measured']:,} of {committed:,} shards"
    again = f", {layer['control_rows']:,} of them run twice" if layer["control_rows"] else ""
    return f"{name}: measured on {some}{again}"


def _line(text: str, value: str, beside: str = "") -> str:
    return f"  {text:<48}{value:>10}  {beside:>10}".rstrip()


def summary(measured: Measured, target: TargetSpec | None, num_shards: int) -> str | None:
    """Returns what was measured of a layer in one line; None if nothing was.

    Args:
        measured: Of a few shards.
        target: How rows were kept; None for losses.
        num_shards: How many shards the layer has.
    """
    means = measured.means()
    if not means:
        return None
    of = f"({measured.sums['rows']:,.0f} rows of {measured.shards:,} of {num_shards:,} shards)"
    if target is None:
        return (
            f"alpha {means['alpha']:.3f}, {means['alpha_estimate']:.3f} from the store; gradients off by "
            f"{means['angle_shard']:.1f} degrees {of}"
        )
    name, what = ("tv_draws", "TV of the draws") if target.scheme.draws else ("kl_tail", "in the tail")
    away = f"{means.get(name, math.nan):.3g} {what}"
    return f"kept mass {means['mass']:.3f}; KL {means['kl_codes']:.2g} of codes, {away} {of}"
