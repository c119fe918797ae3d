"""What a store will take before it is made: rows, bytes, objects, hours, price. Arithmetic; no tokenizer, no model.

The documents are looked at, and a target is tried, by dump/planning.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from logitstore.dump.planning.assumptions import Range
from logitstore.format import layout, zarr_objects
from logitstore.format.schemes import OPTIONS, describe, make_scheme

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from logitstore.dump.planning.assumptions import Cost
    from logitstore.format.schemes import Scheme
    from logitstore.format.spec import TargetSpec

RECORD_BYTES = {"tokens": 800, "target": 1600, "losses": 1000}
"""Of a commit record, about; by layer."""
GROUP_BYTES = 600
"""Of the zarr.json of a group, about."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What documents come to, from all of them or from a sample."""

    name: str
    columns: str
    records: int
    """Records in the data."""
    sampled: int
    """How many of them were tokenised."""
    documents: Range
    rows: Range
    counted: Range
    """Rows whose loss mask is 1."""
    shards: Range
    shard_rows: int
    max_length: int
    vocab_size: int
    token_bytes: float
    """Of all arrays of `tokens`, compressed, a row."""


def check_arguments(args: argparse.Namespace) -> list[Scheme]:
    """Checks what can be checked before anything is opened, and returns the schemes to plan.

    Raises:
        ValueError: A value is out of range, or an option of another scheme.
    """
    for name in ("sample_documents", "calibrate", "num_actors", "batch_tokens", "shard_rows", "rows_per_s"):
        if (value := getattr(args, name)) is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name} must be above 0, got {name}={value}")
    if not 0 <= args.price_per_gb_month < float("inf"):
        raise ValueError(f"price_per_gb_month must be at least 0, got price_per_gb_month={args.price_per_gb_month}")
    if args.target is None and args.tokenizer is None:
        raise ValueError("target must be given, got none; give --target, or --tokenizer where no model is needed yet")
    if args.target is None and args.calibrate is not None:
        raise ValueError(f"target must be given with --calibrate, got none, calibrate={args.calibrate}; give --target")
    if args.calibrate is not None and args.rows_per_s is not None:
        raise ValueError(f"rows_per_s must be left out with --calibrate, which measures it, got rows_per_s="
                         f"{args.rows_per_s}")  # fmt: skip
    given = {name: getattr(args, name, None) for options in OPTIONS.values() for name in options}
    if args.scheme is not None:
        return [make_scheme(args.scheme, given)]
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name} must be left out without --scheme, got {name}={value}; say --scheme of which")
    return [make_scheme(name, {}) for name in OPTIONS]


def plan(
    corpus: Corpus,
    costs: Sequence[tuple[TargetSpec, Cost]],
    *,
    references: Sequence[str] = (),
    num_actors: int = 1,
    price_per_gb_month: float = 0.023,
    calibrated: str | None = None,
) -> dict[str, Any]:
    """Adds up, as JSON values; ranges are pairs.

    Args:
        corpus: What the documents come to.
        costs: The schemes, and what a row costs with each.
        references: Names of the losses layers.
        num_actors: Actors of the dump, each as fast as `rows_per_s` says.
        price_per_gb_month: Of 10^9 bytes.
        calibrated: What the costs were measured with; None where they are assumed.
    """
    return {
        "data": {name: _pair(getattr(corpus, name)) for name in Corpus.__dataclass_fields__},
        "references": list(references),
        "num_actors": num_actors,
        "price_per_gb_month": price_per_gb_month,
        "calibrated": calibrated,
        "schemes": [_scheme(corpus, spec, cost, references, num_actors, price_per_gb_month) for spec, cost in costs],
    }


def _pair(value: object) -> object:
    return [float(value.low), float(value.high)] if isinstance(value, Range) else value


def _scheme(
    corpus: Corpus, spec: TargetSpec, cost: Cost, references: Sequence[str], num_actors: int, price: float
) -> dict[str, Any]:
    layers = {"tokens": 1, "target": spec.room} | {layout.losses_layer(name): 1 for name in references}
    num_bytes = corpus.rows * corpus.token_bytes
    num_bytes += corpus.counted * (cost.target_bytes + cost.loss_bytes * len(references))
    num_objects = Range.exactly(sum(len(layout.layer_arrays(layer)) + 1 for layer in layers) + 1 + bool(references))
    num_bytes += Range.exactly(GROUP_BYTES * (len(layers) + 1 + bool(references)))
    for layer, k in layers.items():
        sizes = {"shard_rows": corpus.shard_rows, "k": k}
        for array in layout.layer_arrays(layer):
            num_bytes += Range.exactly(len(zarr_objects.array_metadata(array, num_shards=1, **sizes)))
        arrays = [a for a in layout.layer_arrays(layer) if a.name != "draws" or spec.scheme.name == "sample"]
        fixed = sum(zarr_objects.index_bytes(array, **sizes) for array in arrays)
        num_bytes += corpus.shards * (fixed + RECORD_BYTES[layer.partition("/")[0]])
        num_objects += corpus.shards * (len(arrays) + 1)
    hours = None
    if cost.rows_per_s is not None:
        hours = corpus.rows * (1 / (cost.rows_per_s * num_actors * 3600))
    return {
        "scheme": describe(spec.scheme),
        "entries_per_row": _pair(cost.entries),
        "target_bytes_per_counted_row": _pair(cost.target_bytes),
        "bytes": _pair(num_bytes),
        "objects": _pair(num_objects),
        "price_per_month": _pair(num_bytes * (price / 1e9)),
        "rows_per_s": cost.rows_per_s,
        "hours": _pair(hours),
    }
