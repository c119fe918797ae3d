"""Computes the cost of a store before it is made: rows, bytes, objects, hours, price. Arithmetic only.

The inputs come from other modules: survey.py tokenises the documents, and trial_run.py runs the models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from logitstore.dump.planning.assumptions import Range
from logitstore.format import layout, zarr_objects
from logitstore.format.schemes import describe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from logitstore.dump.planning.assumptions import Cost
    from logitstore.format.spec import TargetSpec

RECORD_BYTES = {"tokens": 800, "target": 1600, "losses": 1000}
"""Approximate size of a commit record in bytes, by layer."""
GROUP_BYTES = 600
"""Approximate size in bytes of the zarr.json of a group."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Number and size of the documents, counted on all records or estimated from a sample."""

    name: str
    """Value of --data, without credentials."""
    columns: str
    """Columns that the documents are made from, joined by commas."""
    records: int
    """Number of records in the data."""
    sampled: int
    """Number of these records that were tokenised."""
    documents: Range
    """Number of documents."""
    rows: Range
    """Number of rows."""
    counted: Range
    """Number of rows whose loss mask is 1."""
    shards: Range
    """Number of shards."""
    shard_rows: int
    """Largest number of rows in a shard."""
    max_length: int
    """Largest number of tokens in a document."""
    vocab_size: int
    """Size of the tokenizer's vocabulary."""
    token_bytes: float
    """Compressed bytes of a row, summed over the arrays of the layer `tokens`."""


def plan(
    corpus: Corpus,
    costs: Sequence[tuple[TargetSpec, Cost]],
    *,
    references: Sequence[str] = (),
    num_actors: int = 1,
    price_per_gb_month: float = 0.023,
    calibrated: str | None = None,
) -> dict[str, Any]:
    """Computes the cost of a store for each scheme.

    Args:
        corpus: Number and size of the documents.
        costs: For each scheme, the spec of the target layer and the cost of a row.
        references: Names of the losses layers.
        num_actors: Number of actors of the dump. Each of them computes `Cost.rows_per_s` rows per second.
        price_per_gb_month: Price of storing 10^9 bytes for a month.
        calibrated: Description of the measurement that the costs come from; None if the costs are assumed.

    Returns:
        The figures as JSON values. A range is a pair [low, high]. "schemes" is a list with the figures of each scheme,
        in the order of `costs`.
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
    # For the target and losses layers, only rows that count are included: masked rows take almost no space there.
    num_bytes = corpus.rows * corpus.token_bytes
    num_bytes += corpus.counted * (cost.target_bytes + cost.loss_bytes * len(references))
    # Each array, each layer and the root have a zarr.json. If there are references, the group of the losses layers has
    # one too.
    num_objects = Range.exactly(sum(len(layout.layer_arrays(layer)) + 1 for layer in layers) + 1 + bool(references))
    num_bytes += Range.exactly(GROUP_BYTES * (len(layers) + 1 + bool(references)))
    for layer, k in layers.items():
        sizes = {"shard_rows": corpus.shard_rows, "k": k}
        for array in layout.layer_arrays(layer):
            num_bytes += Range.exactly(len(zarr_objects.array_metadata(array, num_shards=1, **sizes)))
        # Each shard has an object for each array, and a commit record. Only the scheme `sample` fills `draws`.
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
