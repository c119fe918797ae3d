"""Measures costs for `logitstore plan --calibrate`: runs documents through the models as the dump does. Uses no Ray.

R: number of rows. D: number of documents. G: number of groups of records.
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
"""Maximum number of documents in a shard of the warm-up. The warm-up runs before the measurement and is not timed."""


GROUPS = 32
"""Maximum number of groups into which the records are divided. The standard errors are computed from the differences
between groups. More groups take more time, because each group is encoded separately."""


class Calibration(NamedTuple):
    """Measured cost of a row, and the number of documents and rows that were measured."""

    cost: Cost
    """Cost of a row."""
    records: int
    """Number of records in which the target scored rows that count."""
    documents: int
    """Number of documents that all models scored."""
    rows: int
    """Number of rows in the documents that all models scored."""
    counted: int
    """Number of rows that count in the documents that all models scored."""


def encoded_bytes(layer: str, arrays: Mapping[str, NDArray[Any]], shard_rows: int, k: int) -> int:
    """Encodes the arrays of a shard as a dump would, and returns their encoded size.

    Args:
        layer: Name of the layer.
        arrays: Arrays by name, without padding.
        shard_rows: Largest number of rows in a shard.
        k: Largest number of entries in a row.

    Returns:
        Size of all objects in bytes, without their indexes. The indexes have a fixed size, which `cost.plan` adds.
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
    """Scores a shard with all models as the dump does. References skip the documents on which the target fails.

    Args:
        target: The target.
        references: Models whose losses are computed, by name.
        shard: The shard.
        spec: Spec of the target layer.
        batch_tokens: Largest number of tokens in a forward pass, including padding.

    Returns:
        A dictionary with the target's rows under the key "target", followed by the losses of each reference under the
        key "reference NAME". If a model fails on every document, the result is instead a string that holds the key of
        this model and the reason.
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
    """Divides all documents into small shards of at most WARM_UP_DOCUMENTS documents, and yields these shards."""
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
    """Scores and encodes documents as the dump does, without writing them, and measures bytes and time.

    Documents on which a model fails are left out, because a dump would set them aside. Shards that contain only such
    documents are left out too.

    Args:
        target: The target.
        references: Models whose losses are planned, by name.
        shards: Shards with the documents to score.
        spec: Spec of the target layer, with the scheme.
        shard_rows: Largest number of rows in a shard.
        batch_tokens: Largest number of tokens in a forward pass, including padding.
        records: [D]: number of the record that each document comes from.
        share: Number of different records in `records`, divided by the number of all records that have documents. If
            the share is 1, the costs are exact; otherwise, they are ranges.

    Returns:
        The measured cost, and the number of documents and rows that were measured.

    Raises:
        ValueError: No document was scored by all models.
    """
    entries = target_counted = target_bytes = loss_counted = loss_bytes = 0
    documents = rows = counted = seen = 0
    seconds = 0.0
    kept: list[_Rows] = []
    failures: list[str] = []
    # The warm-up ends as soon as all models have scored one small shard. It keeps slow first steps out of the timing.
    for part in _parts(shards):
        if not isinstance(score_all(target, references, part, spec, batch_tokens), str):
            break
    for shard in shards:
        records_of_rows = np.repeat(records[seen : seen + len(shard)], shard.lengths)
        seen += len(shard)
        started = time.perf_counter()
        found = score_all(target, references, shard, spec, batch_tokens)
        taken = time.perf_counter() - started
        # A shard that fails as a whole is left out of the time too. Encoding is not timed, because in a dump it runs
        # while the next shard is on the device.
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
        # A reference may set aside further documents, so losses layers have a count of their own.
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
            f"calibrate needs a document that all models can score, got none among {sum(map(len, shards))} "
            f"({failures[0]}); check that the models run, or give a larger --calibrate"
        )
    num_records = len(np.unique(np.concatenate([rows.records[rows.counted] for rows in kept])))
    groups = _groups(kept, spec) if share < 1 else np.ones((1, 3))
    cost = Cost(
        entries=around(entries / target_counted, groups[:, 1], groups[:, 0], share),
        target_bytes=around(target_bytes / target_counted, groups[:, 2], groups[:, 0], share),
        # A row of a losses layer is two floats, whose size hardly depends on the row. No range is needed.
        loss_bytes=Range.exactly(loss_bytes / max(loss_counted, 1)),
        rows_per_s=rows / seconds,
    )
    return Calibration(cost=cost, records=num_records, documents=documents, rows=rows, counted=counted)


class _Rows(NamedTuple):
    """The target's rows of a shard."""

    arrays: Mapping[str, NDArray[Any]]
    """Arrays by name, in the form in which they are stored."""
    records: NDArray[np.intp]
    """[R]: record of each row."""
    counted: NDArray[np.bool_]
    """[R]: whether the row has entries."""


def _groups(kept: Sequence[_Rows], spec: TargetSpec) -> NDArray[np.float64]:
    """Divides records into groups, and measures the number of counted rows, entries and bytes of each group.

    The rows of each group are encoded alone, which takes somewhat more bytes than the same rows take in a shard.

    Returns:
        Float64 [G, 3]: counted rows, entries, bytes. Records without counted rows are left out.
    """
    records = np.concatenate([rows.records for rows in kept])
    counted = np.concatenate([rows.counted for rows in kept])
    arrays = {name: np.concatenate([rows.arrays[name] for rows in kept]) for name in kept[0].arrays}
    some = np.unique(records[counted])
    # Records were drawn at random, so a group of every GROUPS-th record is random too. Group -1 holds the records
    # without counted rows.
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
    """Estimates the range of a ratio of two sums over all records, from a random sample of the records.

    Args:
        ratio: Ratio measured on the sample.
        values: [G]: numerator of the ratio in each group of the sample. The result stays the same if all numerators are
            multiplied by the same number.
        counted: [G]: denominator of the ratio in each group, above 0.
        share: Fraction of all records that are in the sample.

    Returns:
        The range from two standard errors below the ratio, but at least 0, to two standard errors above it. If the
        sample holds all records, or has a single group and thus no standard error, the range is only the ratio itself.
    """
    if share >= 1 or len(values) < 2:
        return Range.exactly(ratio)
    # Relative standard error of a ratio estimator (Cochran, Sampling Techniques, chapter 6).
    left = values - counted * (values.sum() / counted.sum())
    error = math.sqrt(len(left) / (len(left) - 1) * float((left**2).sum()) * (1 - share)) / float(values.sum())
    margin = STANDARD_ERRORS * error * ratio
    return Range(max(ratio - margin, 0.0), ratio + margin)


def rounded(shard_rows: int) -> int:
    """Rounds a shard's number of rows as the dump does: a number above ROW_CHUNK is rounded up to a multiple of it."""
    return shard_rows if shard_rows <= ROW_CHUNK else -(-shard_rows // ROW_CHUNK) * ROW_CHUNK
