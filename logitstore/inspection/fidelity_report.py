"""Collects and formats the report of `logitstore fidelity`: how close stored rows are to the target's distributions.

Figures that need the target's exact distributions were measured during the dump and are read from the commit records.
The other figures are computed from the stored values. docs/fidelity.md explains each figure.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from logitstore.errors import LayerNotFoundError
from logitstore.format import schemes
from logitstore.inspection import calibration_error
from logitstore.inspection.measured import Measured, evenly_spaced, layer_bytes, read_measured
from logitstore.inspection.verify import places
from logitstore.rows.codec import LARGEST_TAIL

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from logitstore.format.spec import TargetSpec
    from logitstore.store.catalog import Layer
    from logitstore.store.reader import Store

TAIL_SHARDS = 8
"""Maximum number of shards whose tails are read for the distribution of the kept mass."""
CALIBRATED_SHARDS = 2
"""Maximum number of shards whose entries are read for the calibration of the likeliest token."""
NUM_BINS = 40
"""Number of bins of the histogram of the kept mass."""
SMALLEST_BYTES = 0.005
"""Arrays that take fewer bytes per row than this are not listed: their size would be shown as 0.00."""

DIVERGENCES = {
    "kl_codes": "KL of rounding to codes",
    "kl_tail": "KL within the tail",
    "kl_renormalised": "KL if the tail were dropped",
    "tv_draws": "total variation of the draws",
    "control_kl": "KL of the target run twice",
    "control_tv": "total variation, run twice",
}
"""Labels of the divergences that are shown for the target layer. The keys are the names of the means. The two control
divergences compare two runs of the target. They show the numerical noise of the target, as a scale for the other
divergences."""
SMALL_LOSS = 0.01
"""If the mean loss of a row is at most this value, in nats, the verdict calls the store close to its target."""
OF_A_LOST_TAIL = ("kl_tail", "kl_renormalised")
"""Divergences that are shown only for truncated rows. If entries were drawn, the draws represent the tail too."""

LOSSES = {
    "alpha": ("alpha, exact", ""),
    "alpha_estimate": ("alpha, from the store", ""),
    "alpha_error": ("alpha, mean error of a row", ""),
    "angle_row": ("angle of a row's gradient", " degrees"),
    "angle_shard": ("angle of a shard's gradient", " degrees"),
}
"""Labels and units of the figures that are shown for a losses layer. The keys are the names of the means. The figures
tell how much a model's acceptance rate and gradient on the stored rows differ from those on the exact distributions."""


def describe(store: Store, *, sample: float = 1.0, seed: int = 0) -> dict[str, Any]:
    """Returns the figures of `logitstore fidelity` as JSON values.

    Args:
        store: A store with a target layer, finished or not.
        sample: Share of each layer's shards to read, in (0, 1]. The commit records of all chosen shards are read,
            but the stored values of only a few of them.
        seed: Seed of the random choice of the shards.

    Raises:
        ValueError: `sample` is out of range.
        LayerNotFoundError: The store has no target layer, or no shard of it is committed.
        DamagedShardError: The stored bytes of a shard differ from what was committed.
    """
    # These are the shards that `verify` reads with the same sample and seed.
    chosen = places(store, sample, seed)
    target = store.spec.target
    if target is None:
        raise LayerNotFoundError(f"store must have target rows, got {store.url} without any; dump the target first")
    shards = {name: [shard for of, shard in chosen if of == name] for name in store.layers}
    if not shards["target"]:
        raise LayerNotFoundError(f"store must have target rows, got {store.url} with none written yet; finish the dump")
    layers = {name: _measured(store, layer, shards[name]) for name, layer in store.layers.items() if name != "tokens"}
    return {
        "url": store.url,
        "scheme": schemes.describe(target.scheme),
        "verdict": verdict(layers["target"]["means"], is_drawn=target.scheme.draws),
        "tail_is_lost": not target.scheme.draws,
        "bytes_per_row": _bytes_per_row(store, store.layers["target"]),
        "entries_per_row": _entries_per_row(store.layers["target"]),
        "kept_mass": _kept_mass(store, shards["target"]),
        "calibration": _calibration(store, target, shards["target"]),
        "layers": layers,
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
    # Shards after the store's last one belong to an unfinished append, which readers do not see.
    return len(layer.index.upto(store.spec.num_shards))


def _bytes_per_row(store: Store, layer: Layer) -> dict[str, float]:
    counted = int(layer.index.upto(store.spec.num_shards).counted.sum())
    return {name: round(size / counted, 3) if counted else 0.0 for name, size in layer_bytes(store, layer.name).items()}


def _entries_per_row(layer: Layer) -> float:
    counted = int(layer.index.counted.sum())
    return round(int(layer.index.entries.sum()) / counted, 3) if counted else 0.0


def _kept_mass(store: Store, shards: list[int]) -> dict[str, Any]:
    """Returns the distribution of the kept mass. Reads the rows of at most TAIL_SHARDS of the given shards."""
    read = _some(store, shards, TAIL_SHARDS)
    of = {"shards": len(read), "shards_committed": _num_committed(store, store.layers["target"])}
    tails = [store.reader.read_arrays("target", shard)["tail"] for shard in read]
    tail = np.concatenate([np.zeros(0, dtype=np.float32), *tails])
    # The tail is NaN at rows that do not count. The tail mass is limited in the same way as in decoding, because
    # rounding may have made the stored tail mass 1.
    kept = np.sort(1.0 - np.minimum(np.exp(tail[~np.isnan(tail)].astype(np.float64)), LARGEST_TAIL))
    if not len(kept):
        return {**of, "rows": 0}
    # Bins begin at a round number, so that their edges are easy to read.
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
    """Returns the calibration of the likeliest token.

    If entries were drawn, no row is measured, because a row may lack its likeliest token.
    """
    if target.scheme.draws:
        return {"rows": 0}
    read = _some(store, shards, CALIBRATED_SHARDS)
    return {"shards": len(read), **calibration_error.measure(store, read)}


def _some(store: Store, shards: list[int], most: int) -> list[int]:
    """Returns at most `most` of the given shards, evenly spaced. Leaves out shards whose target rows cannot be read."""
    layer = store.layers["target"]
    useless = layer.stale | layer.index.contested
    return evenly_spaced([shard for shard in shards if shard not in useless], most)


def render(facts: dict[str, Any]) -> Iterator[str]:
    """Formats the result of `describe` as a table, with the verdict last."""
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
        yield "  entries were drawn: their weights also represent the tokens without an entry"
    for name, layer in facts["layers"].items():
        yield ""
        if name == "target":
            yield from _render_target(layer, () if facts["tail_is_lost"] else OF_A_LOST_TAIL)
        else:
            yield from _render_losses(name, layer)
    yield ""
    yield f"verdict: {facts['verdict']}"


def verdict(means: Mapping[str, float], *, is_drawn: bool) -> str:
    """Returns a text that says how close stored rows are to the target, and which options would bring them closer.

    Args:
        means: Means of the target layer's fidelity sums (docs/fidelity.md); empty if nothing was measured.
        is_drawn: Whether entries were drawn. Drawn entries are an unbiased estimate of the distribution.
    """
    if not means:
        return "unknown, because no row was measured when the store was dumped"
    rounding = f"rounding loses {means['kl_codes']:.1g} nats a row"
    if is_drawn:
        noise = f" (total variation {means['tv_draws']:.2f})" if "tv_draws" in means else ""
        return (
            f"unbiased. Draws stand for the whole vocabulary; a single row is noisy{noise}, and the noise averages out "
            f"over rows. {rounding.capitalize()}. More --num_draws give less noise."
        )
    lost = (
        f"{means['kl_tail']:.2g} nats a row are lost within the tail, which holds {1 - means['mass']:.1%} of the mass"
    )
    if means["kl_codes"] + means["kl_tail"] <= SMALL_LOSS:
        return f"close to the target. {lost.capitalize()}; {rounding}."
    return (
        f"biased by truncation. {lost.capitalize()}; {rounding}. A larger --k or --mass loses less; --scheme hybrid is "
        "unbiased."
    )


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
        why = "" if name == "target" else ", because the target did not run in the same dump"
        return f"{name}: nothing was measured in {layer['shards']:,} of {committed:,} shards{why}"
    some = f"{layer['rows']:,} rows of {layer['shards_measured']:,} of {committed:,} shards"
    again = f", {layer['control_rows']:,} of them run twice" if layer["control_rows"] else ""
    return f"{name}: measured on {some}{again}"


def _line(text: str, value: str, beside: str = "") -> str:
    return f"  {text:<48}{value:>10}  {beside:>10}".rstrip()


def summary(measured: Measured, target: TargetSpec | None, num_shards: int) -> str | None:
    """Returns one line of text about the fidelity of a layer; None if nothing was measured.

    Args:
        measured: Fidelity sums of a few shards.
        target: Spec of the target layer; None if the figures are those of a losses layer.
        num_shards: Number of shards of the layer.
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
    return f"KL {means['kl_codes']:.2g} of codes, {away} {of}"
