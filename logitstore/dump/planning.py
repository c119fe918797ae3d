"""The part of `logitstore plan` that tokenises documents and, where it is to measure, runs models. Knows no Ray.

R rows of a shard.
"""

from __future__ import annotations

import itertools
import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import datasets
import numpy as np
import torch

from logitstore import codec, layout, objects
from logitstore.assumptions import Cost, Range, assumed
from logitstore.causal_lm import SplitLM, check_model, load_config, load_tokenizer, tokenizer_spec
from logitstore.dump.documents import assign_shards, open_encoder, progress_bars
from logitstore.dump.running import without
from logitstore.dump.scoring import score_losses, score_target
from logitstore.dump.sources import find_source
from logitstore.options import storage_options
from logitstore.plan import Corpus, check_arguments, plan
from logitstore.shards import Shard
from logitstore.spec import ROW_CHUNK, DataSpec, ModelSpec, StoreSpec, TargetSpec, check_room
from logitstore.weights import load_weights, loading_bars

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from logitstore.dump.scoring import Scored

STANDARD_ERRORS = 2.0
"""How far a range of what was estimated from a sample goes to either side."""

WARM_UP_DOCUMENTS = 4
"""How many documents the models take at once before they are timed."""


class Tokens(NamedTuple):
    """A document."""

    ids: NDArray[np.int32]
    mask: NDArray[np.uint8]


class Calibration(NamedTuple):
    """What rows cost, and what that was measured with: documents that all models scored."""

    cost: Cost
    documents: int
    rows: int
    counted: int


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Plans what `logitstore plan` was asked for.

    Raises:
        ValueError: An argument, the data or a model is no good; before any weights are read, but for what only they
            show.
        LogitStoreError: The data cannot be reached.
    """
    schemes = check_arguments(args)
    remote = args.trust_remote_code
    name = args.tokenizer or args.target
    revision = args.revision if name == args.target else None
    tokenizer = load_tokenizer(name, revision=revision, trust_remote_code=remote)
    made = tokenizer_spec(tokenizer, uses_chat_template=False)
    context = None
    if args.target is not None:
        config = load_config(args.target, revision=args.revision, trust_remote_code=remote)
        context = getattr(config.get_text_config(), "max_position_embeddings", None)
    max_length = min(2048, context or 2048) if args.max_length is None else args.max_length
    shard_rows = args.shard_rows
    if shard_rows > ROW_CHUNK:  # as the dump rounds it
        shard_rows = -(-shard_rows // ROW_CHUNK) * ROW_CHUNK
    nothing = DataSpec(source="", digest=None, columns="text", mask_policy="all")
    StoreSpec(tokenizer=made, data=nothing, max_length=max_length, shard_rows=shard_rows, num_shards=0)

    def describe_model(model: str, what: str, its_revision: str | None) -> ModelSpec:
        return check_model(
            model, what=what, made=made, max_length=max_length, revision=its_revision, dtype=args.dtype,
            trust_remote_code=remote,
        )[0]  # fmt: skip

    references = _references(args.reference)
    target = ModelSpec(name="", revision="", dtype="", padded_vocab_size=made.vocab_size)
    if args.target is not None:
        target = describe_model(args.target, "target", args.revision)
    described = {name: describe_model(model, f"reference {name}", None) for name, model in references.items()}
    specs = [TargetSpec(model=target, scheme=scheme) for scheme in schemes]
    for spec in specs:
        spec.scheme.check_vocabulary(made.vocab_size)
        check_room(shard_rows, spec.room)
    corpus, documents = look_at(
        args.data, tokenizer, vocab_size=made.vocab_size, max_length=max_length, shard_rows=shard_rows,
        sample_documents=max(args.sample_documents, args.calibrate or 0), calibrate=args.calibrate,
        options=storage_options(args.storage_options),
    )  # fmt: skip
    calibrated = None
    if args.calibrate is None:
        costs = [replace(assumed(spec.scheme, made.vocab_size), rows_per_s=args.rows_per_s) for spec in specs]
    else:
        device = "cuda" if torch.cuda.is_available() else "cpu"

        def load(model: str, what: str, spec: ModelSpec, its_revision: str | None) -> SplitLM:
            weights = load_weights(
                model, what=what, revision=its_revision, dtype=spec.dtype, attn_implementation=args.attn_implementation,
                trust_remote_code=remote, device=device,
            )  # fmt: skip
            lm = SplitLM(weights, made.vocab_size)
            lm.check()
            return lm

        with loading_bars(False):
            lm = load(args.target, "target", target, args.revision)
            others = [load(references[name], f"reference {name}", spec, None) for name, spec in described.items()]
        shards = in_shards(documents, shard_rows)
        found = [calibrate(lm, others, shards, spec, shard_rows, args.batch_tokens) for spec in specs]
        costs = [one.cost for one in found]
        # Losses are of a scheme's entries, so that a reference may fail with one and not with another.
        fewest = min(found, key=lambda one: one.documents)
        calibrated = (
            f"{args.target} on this machine's {device}: {fewest.documents:,} documents, {fewest.rows:,} rows of which "
            f"{fewest.counted:,} count"
        )
        if failed := len(documents) - fewest.documents:
            calibrated += f"; documents left out because a model fails with them: {failed:,}"
    return plan(
        corpus,
        list(zip(specs, costs, strict=True)),
        references=list(references),
        num_actors=args.num_actors,
        price_per_gb_month=args.price_per_gb_month,
        calibrated=calibrated,
    )


def _references(given: Sequence[str]) -> dict[str, str]:
    models: dict[str, str] = {}
    for value in given:
        name, separator, model = value.partition("=")
        if not separator or not model or name in models:
            raise ValueError(f"reference must be NAME=MODEL, each NAME once, got reference={value}")
        layout.losses_layer(name)
        models[name] = model
    return models


def look_at(
    data: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    vocab_size: int,
    max_length: int,
    shard_rows: int,
    sample_documents: int,
    calibrate: int | None,
    options: dict[str, Any] | None,
) -> tuple[Corpus, list[Tokens]]:
    """Tokenises records of the data, all or some drawn at random, as the dump would.

    Args:
        data: As for the dump.
        tokenizer: As for the dump.
        vocab_size: The tokenizer's.
        max_length: Most tokens of a document.
        shard_rows: Most rows of a shard.
        sample_documents: How many records to tokenise at most.
        calibrate: How many records with documents to return those of, the first drawn; None for none.
        options: What the data's file system needs.

    Raises:
        ValueError: The data are no good, or none of the records gives a document.
    """
    source = find_source(data, options)
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="logitstore-", dir=cache) as name, progress_bars(False):
        dataset, encoder = open_encoder(source, Path(name), tokenizer, vocab_size, max_length)
        num_records = len(dataset)
        chosen = np.random.default_rng(0).permutation(num_records)[:sample_documents]
        found: list[list[Tokens]] = []
        for index in chosen.tolist():
            made = encoder(dataset[index : index + 1], [index])
            pairs = zip(made["ids"], made["mask"], strict=True)
            found.append([Tokens(ids, mask) for ids, mask in pairs if len(ids)])
    if not any(found):
        raise ValueError(
            f"data must hold documents of 2 tokens of which one counts, got data={source.name} with none in "
            f"{len(found)} records; check the columns and the loss mask"
        )
    # In the data's order, as shards are filled.
    in_order = [tokens for i in np.argsort(chosen) for tokens in found[i]]
    lengths = np.array([len(tokens.ids) for tokens in in_order], dtype=np.int64)
    per_record = np.array([_figures(documents) for documents in found], dtype=np.float64)
    documents, rows, counted = (_estimate(column, num_records) for column in per_record.T)
    shards = Range.exactly(len(assign_shards(lengths, shard_rows)) - 1)
    if len(found) < num_records:
        # A shard ends where the next document does not fit: half of one, seen from a random place, is left unused.
        room = shard_rows - float((lengths.astype(float) ** 2).sum() / lengths.sum()) / 2
        shards = Range(math.ceil(rows.low / room), math.ceil(rows.high / room))
    corpus = Corpus(
        name=source.name, columns=", ".join(encoder.columns), records=num_records, sampled=len(found),
        documents=documents, rows=rows, counted=counted, shards=shards, shard_rows=shard_rows, max_length=max_length,
        vocab_size=vocab_size, token_bytes=_token_bytes(in_shards(in_order, shard_rows), shard_rows),
    )  # fmt: skip
    with_documents = [documents_ for documents_ in found if documents_]
    return corpus, [tokens for documents_ in with_documents[:calibrate] for tokens in documents_] if calibrate else []


def _figures(documents: Sequence[Tokens]) -> tuple[int, int, int]:
    """Returns documents, rows and rows that count of one record."""
    return len(documents), sum(len(d.ids) for d in documents), sum(int(d.mask.sum()) for d in documents)


def _estimate(values: NDArray[np.float64], total: int) -> Range:
    """Estimates the sum over all records from those of a sample drawn without replacement."""
    n = len(values)
    if n == total:
        return Range.exactly(float(values.sum()))
    error = float(values.std(ddof=1)) * math.sqrt((1 - n / total) / n) if n > 1 else math.inf
    middle, margin = float(values.mean()) * total, STANDARD_ERRORS * error * total
    # What was seen is there, whatever the others are.
    return Range(max(middle - margin, float(values.sum())), middle + margin if margin < math.inf else 2 * middle)


def in_shards(documents: Sequence[Tokens], shard_rows: int) -> list[Shard]:
    """Puts documents into shards as the dump does, in memory alone."""
    lengths = np.array([len(tokens.ids) for tokens in documents], dtype=np.int64)
    bounds = assign_shards(lengths, shard_rows).tolist()
    return [
        Shard(
            index=number,
            ids=np.concatenate([tokens.ids for tokens in documents[first:stop]]).astype(np.uint32),
            loss_mask=np.concatenate([tokens.mask for tokens in documents[first:stop]]).astype(bool),
            lengths=lengths[first:stop],
            tokens_digest="",
            rows=None,
            target_digest=None,
            losses={},
        )
        for number, (first, stop) in enumerate(itertools.pairwise(bounds))
    ]


def _token_bytes(shards: Sequence[Shard], shard_rows: int) -> float:
    num_bytes = sum(
        encoded_bytes(
            "tokens", {"ids": s.ids, "loss_mask": s.loss_mask.astype(np.uint8), "lengths": s.lengths}, shard_rows, 1
        )
        for s in shards
    )
    return num_bytes / sum(len(shard.ids) for shard in shards)


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
        data = objects.encode(arrays[array.name], array, shard_rows=shard_rows, k=k)
        if data is not None:
            total += len(data) - objects.index_bytes(array, shard_rows=shard_rows, k=k)
    return total


def score_all(
    target: SplitLM, references: Sequence[SplitLM], shard: Shard, spec: TargetSpec, batch_tokens: int
) -> tuple[Scored, list[Scored]] | str:
    """Scores a shard with all models as the dump does: what the target fails with, references do not see.

    Returns:
        The target's rows and the references' losses, or, if a model fails with every document, why.
    """
    try:
        scored = score_target(target, shard, spec, batch_tokens=batch_tokens)
        rows, left = codec.decode(scored.arrays, spec), without(shard, scored.set_aside)
        return scored, [score_losses(lm, left, rows, batch_tokens=batch_tokens) for lm in references]
    except ValueError as error:
        return str(error)


def _parts(shards: Sequence[Shard]) -> Iterator[Shard]:
    """Yields all documents, a few at a time."""
    for shard in shards:
        for first in range(0, len(shard), WARM_UP_DOCUMENTS):
            lengths = shard.lengths[first : first + WARM_UP_DOCUMENTS]
            rows = slice(int(shard.starts[first]), int(shard.starts[first + len(lengths)]))
            yield replace(shard, ids=shard.ids[rows], loss_mask=shard.loss_mask[rows], lengths=lengths)


def calibrate(
    target: SplitLM,
    references: Sequence[SplitLM],
    shards: Sequence[Shard],
    spec: TargetSpec,
    shard_rows: int,
    batch_tokens: int,
) -> Calibration:
    """Scores and encodes documents as the dump does, writes nothing, and measures.

    What a dump would set aside is left out: documents that a model fails with, and shards of nothing else.

    Args:
        target: The target.
        references: Models whose losses are to be kept.
        shards: The documents.
        spec: Of the target, with the scheme.
        shard_rows: Rows that a shard has room for.
        batch_tokens: Most tokens of a forward.

    Raises:
        ValueError: There is no document that all models score.
    """
    entries = target_counted = target_bytes = loss_counted = loss_bytes = 0
    documents = rows = counted = 0
    seconds = 0.0
    failures: list[str] = []
    for part in _parts(shards):  # what is slow once, of any model, is not timed
        if not isinstance(score_all(target, references, part, spec, batch_tokens), str):
            break
    for shard in shards:
        started = time.perf_counter()
        found = score_all(target, references, shard, spec, batch_tokens)
        taken = time.perf_counter() - started
        if isinstance(found, str):
            failures.append(found)
            continue
        scored, losses = found
        seconds += taken
        left = without(shard, scored.set_aside)
        entries += int(scored.arrays["counts"].sum(dtype=np.int64))
        target_counted += int(left.loss_mask.sum())
        target_bytes += encoded_bytes("target", scored.arrays, shard_rows, spec.room)
        for loss in losses:
            loss_counted += int(without(left, loss.set_aside).loss_mask.sum())
            loss_bytes += encoded_bytes("losses/reference", loss.arrays, shard_rows, 1)
        set_aside = {document: reason for one in (scored, *losses) for document, reason in one.set_aside.items()}
        failures += set_aside.values()
        documents += len(shard) - len(set_aside)
        rows += len(shard.ids) - int(shard.lengths[list(set_aside)].sum())
        counted += int(without(shard, set_aside).loss_mask.sum())
    if not documents:
        raise ValueError(
            f"calibrate must have a document that all models score, got none in {sum(map(len, shards))} "
            f"({failures[0]}); see that the models run, or take more records with --calibrate"
        )
    cost = Cost(
        entries=Range.exactly(entries / target_counted),
        target_bytes=Range.exactly(target_bytes / target_counted),
        loss_bytes=Range.exactly(loss_bytes / max(loss_counted, 1)),
        rows_per_s=rows / seconds,
    )
    return Calibration(cost=cost, documents=documents, rows=rows, counted=counted)
