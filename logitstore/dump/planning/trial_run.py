"""What `logitstore plan --calibrate` measures: documents through the models, as the dump does. Knows no Ray.

R rows, D documents, G groups of records.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from logitstore.dump.planning.assumptions import STANDARD_ERRORS, Cost, Range
from logitstore.dump.scoring.batch_runner import without
from logitstore.dump.scoring.score import score_losses, score_target
from logitstore.format import layout, zarr_objects
from logitstore.format.spec import ROW_CHUNK
from logitstore.rows import codec

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from logitstore.dump.scoring.score import Scored
    from logitstore.format.spec import TargetSpec
    from logitstore.models.split_lm import SplitLM
    from logitstore.rows.shard import Shard

WARM_UP_DOCUMENTS = 4
"""How many documents the models take at once before they are timed."""


GROUPS = 32
"""Records are put into at most so many groups to see how much they differ: enough, and few to encode."""


class Calibration(NamedTuple):
    """What rows cost, and what that was measured with: documents that all models scored."""

    cost: Cost
    records: int
    """Those of which the target scored rows that count."""
    documents: int
    rows: int
    counted: int


def encoded_bytes(layer: str, arrays: Mapping[str, NDArray[Any]], shard_rows: int, k: int) -> int:
    """Encodes the arrays of a shard as they would be written; bytes without the objects' indexes, whose size is known.

    Args:
        layer: Which.
        arrays: By name, without padding.
        shard_rows: Rows that a shard has room for.
        k: Entries that a row has room for.
    """
    total = 0
    for array in layout.layer_arrays(layer):
        data = zarr_objects.encode(arrays[array.name], array, shard_rows=shard_rows, k=k)
        if data is not None:
            total += len(data) - zarr_objects.index_bytes(array, shard_rows=shard_rows, k=k)
    return total


def score_all(
    target: SplitLM, references: Mapping[str, SplitLM], shard: Shard, spec: TargetSpec, batch_tokens: int
) -> dict[str, Scored] | str:
    """Scores a shard with all models as the dump does: what the target fails with, references do not see.

    Returns:
        The target's rows, then the references' losses, by what the model is called; or, if one fails with every
        document, which and why.
    """
    what = "target"
    try:
        scored = {what: score_target(target, shard, spec, batch_tokens=batch_tokens)}
        rows, left = codec.decode(scored[what].arrays, spec), without(shard, scored[what].set_aside)
        for name, lm in references.items():
            what = f"reference {name}"
            scored[what] = score_losses(lm, left, rows, batch_tokens=batch_tokens)
    except ValueError as error:
        return f"{what}: {error}"
    return scored


def _parts(shards: Sequence[Shard]) -> Iterator[Shard]:
    """Yields all documents, a few at a time."""
    for shard in shards:
        for first in range(0, len(shard), WARM_UP_DOCUMENTS):
            lengths = shard.lengths[first : first + WARM_UP_DOCUMENTS]
            rows = slice(int(shard.starts[first]), int(shard.starts[first + len(lengths)]))
            yield replace(shard, ids=shard.ids[rows], loss_mask=shard.loss_mask[rows], lengths=lengths)


def calibrate(
    target: SplitLM,
    references: Mapping[str, SplitLM],
    shards: Sequence[Shard],
    spec: TargetSpec,
    shard_rows: int,
    batch_tokens: int,
    *,
    records: Sequence[int],
    share: float,
) -> Calibration:
    """Scores and encodes documents as the dump does, writes nothing, and measures.

    What a dump would set aside is left out: documents that a model fails with, and shards of nothing else.

    Args:
        target: The target.
        references: Models whose losses are to be kept, by name.
        shards: The documents.
        spec: Of the target, with the scheme.
        shard_rows: Rows that a shard has room for.
        batch_tokens: Most tokens of a forward.
        records: The record that each document is of, [D].
        share: How many of all records with documents these are; 1: what they cost is known, and no range.

    Raises:
        ValueError: There is no document that all models score.
    """
    entries = target_counted = target_bytes = loss_counted = loss_bytes = 0
    documents = rows = counted = seen = 0
    seconds = 0.0
    kept: list[_Rows] = []
    failures: list[str] = []
    for part in _parts(shards):  # what is slow once, of any model, is not timed
        if not isinstance(score_all(target, references, part, spec, batch_tokens), str):
            break
    for shard in shards:
        records_of_rows = np.repeat(records[seen : seen + len(shard)], shard.lengths)
        seen += len(shard)
        started = time.perf_counter()
        found = score_all(target, references, shard, spec, batch_tokens)
        taken = time.perf_counter() - started
        if isinstance(found, str):
            failures.append(found)
            continue
        scored, *losses = found.values()
        seconds += taken
        left = without(shard, scored.set_aside)
        kept.append(_Rows(scored.arrays, records_of_rows, left.loss_mask))
        entries += int(scored.arrays["counts"].sum(dtype=np.int64))
        target_counted += int(left.loss_mask.sum())
        target_bytes += encoded_bytes("target", scored.arrays, shard_rows, spec.room)
        for loss in losses:
            loss_counted += int(without(left, loss.set_aside).loss_mask.sum())
            loss_bytes += encoded_bytes("losses/reference", loss.arrays, shard_rows, 1)
        set_aside = {number: f"{what}: {why}" for what, one in found.items() for number, why in one.set_aside.items()}
        failures += set_aside.values()
        documents += len(shard) - len(set_aside)
        rows += len(shard.ids) - int(shard.lengths[list(set_aside)].sum())
        counted += int(without(shard, set_aside).loss_mask.sum())
    if not documents:
        raise ValueError(
            f"calibrate must have a document that all models score, got none in {sum(map(len, shards))} "
            f"({failures[0]}); see that the models run, or take more records with --calibrate"
        )
    num_records = len(np.unique(np.concatenate([rows.records[rows.counted] for rows in kept])))
    groups = _groups(kept, spec) if share < 1 else np.ones((1, 3))
    cost = Cost(
        entries=around(entries / target_counted, groups[:, 1], groups[:, 0], share),
        target_bytes=around(target_bytes / target_counted, groups[:, 2], groups[:, 0], share),
        loss_bytes=Range.exactly(loss_bytes / max(loss_counted, 1)),  # two floats, whatever the row
        rows_per_s=rows / seconds,
    )
    return Calibration(cost=cost, records=num_records, documents=documents, rows=rows, counted=counted)


class _Rows(NamedTuple):
    """The target's rows of a shard."""

    arrays: Mapping[str, NDArray[Any]]
    """As stored."""
    records: NDArray[np.intp]
    """The record that each is of, [R]."""
    counted: NDArray[np.bool_]
    """Which of them have entries, [R]."""


def _groups(kept: Sequence[_Rows], spec: TargetSpec) -> NDArray[np.float64]:
    """Counts rows that count, their entries and bytes by group of the records that have any; float64 [G, 3].

    A group's bytes are those of its rows encoded alone: some more than its part of a shard's.
    """
    records = np.concatenate([rows.records for rows in kept])
    counted = np.concatenate([rows.counted for rows in kept])
    arrays = {name: np.concatenate([rows.arrays[name] for rows in kept]) for name in kept[0].arrays}
    some = np.unique(records[counted])
    # The records were drawn at random, so that every GROUPS-th is a random group too.
    group = np.where(np.isin(records, some), np.searchsorted(some, records) % GROUPS, -1)
    figures = []
    for number in range(min(len(some), GROUPS)):
        chosen = {"row": group == number}
        chosen["entry"] = np.repeat(chosen["row"], arrays["counts"])
        own = {array.name: arrays[array.name][chosen[array.per]] for array in layout.layer_arrays("target")}
        num_bytes = encoded_bytes("target", own, rounded(len(own["counts"])), spec.room)
        figures.append((counted[chosen["row"]].sum(), own["counts"].sum(dtype=np.int64), num_bytes))
    return np.array(figures, dtype=np.float64)


def around(ratio: float, values: NDArray[np.float64], counted: NDArray[np.float64], share: float) -> Range:
    """Returns what a ratio of sums over all records lies between, as far as a random sample of them tells.

    Args:
        ratio: As measured.
        values: Its numerator in each of G groups of the sample, up to a factor that they share, [G].
        counted: Its denominator there, above 0, [G].
        share: The sample's share of all records. 1: the ratio is known. Nor is there a range for a single group.
    """
    if share >= 1 or len(values) < 2:
        return Range.exactly(ratio)
    # The standard error of a ratio estimator, relative to it (Cochran, Sampling Techniques, chapter 6).
    left = values - counted * (values.sum() / counted.sum())
    error = math.sqrt(len(left) / (len(left) - 1) * float((left**2).sum()) * (1 - share)) / float(values.sum())
    margin = STANDARD_ERRORS * error * ratio
    return Range(max(ratio - margin, 0.0), ratio + margin)


def rounded(shard_rows: int) -> int:
    """Returns the room in rows of a shard that is to have at least so many, as the dump rounds it."""
    return shard_rows if shard_rows <= ROW_CHUNK else -(-shard_rows // ROW_CHUNK) * ROW_CHUNK
