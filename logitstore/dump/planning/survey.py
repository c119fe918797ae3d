"""Runs `logitstore plan`: tokenises documents. With --calibrate, also runs the models on some of them. Uses no Ray."""

from __future__ import annotations

import itertools
import math
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import datasets
import numpy as np
import torch

from logitstore.documents.sources import find_source
from logitstore.documents.table import assign_shards, open_encoder, progress_bars
from logitstore.dump.planning.assumptions import STANDARD_ERRORS, Cost, Range, assumed
from logitstore.dump.planning.cost import Corpus, plan
from logitstore.dump.planning.report import count_of
from logitstore.dump.planning.trial_run import calibrate, encoded_bytes, rounded
from logitstore.format.spec import DataSpec, ModelSpec, StoreSpec, TargetSpec, check_room
from logitstore.models.identity import check_model, tokenizer_spec
from logitstore.models.loading import ModelSource, load_config, load_model, load_tokenizer, loading_bars
from logitstore.models.probes import check_halves
from logitstore.models.split_lm import SplitLM
from logitstore.rows.shard import Shard
from logitstore.rows.tokens import encode_tokens
from logitstore.storage.options import storage_options

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from logitstore.format.schemes import Scheme


class Tokens(NamedTuple):
    """A document of T tokens."""

    ids: NDArray[np.int32]
    """[T]: token ids."""
    mask: NDArray[np.uint8]
    """[T]: loss mask."""
    record: int
    """Number of the record that the document comes from, in the order in which records were drawn."""


class Drawn(NamedTuple):
    """The records used for a calibration."""

    documents: list[Tokens]
    """Documents of these records."""
    share: float
    """Number of these records, divided by the number of all records that have documents. An estimate if only a sample
    of the data was tokenised."""


def run(
    args: argparse.Namespace, schemes: Sequence[Scheme], references: Mapping[str, str], max_length: int
) -> dict[str, Any]:
    """Plans a dump for `logitstore plan`.

    Args:
        args: Parsed options of the command.
        schemes: Schemes to compare.
        references: Maps the name of each reference whose losses are planned too to its Hugging Face id or folder.
        max_length: Largest number of tokens in a document.

    Returns:
        The figures that `cost.plan` returns.

    Raises:
        ValueError: An argument, the data or a model is invalid. Problems that can be found without the weights are
            raised before any weights are loaded.
        LogitStoreError: The data cannot be reached.
    """
    source_of = partial(
        ModelSource,
        dtype=args.dtype,
        attn_implementation=args.attn_implementation,
        trust_remote_code=args.trust_remote_code,
    )
    name = args.tokenizer or args.target
    revision = args.target_revision if name == args.target else None
    what = "tokenizer" if args.tokenizer else "target"
    if args.target is not None:
        # The configuration is loaded first. If the name is wrong, `load_config` gives a clearer error message than
        # `load_tokenizer`.
        load_config(source_of(name=args.target, revision=args.target_revision), what="target")
    tokenizer = load_tokenizer(source_of(name=name, revision=revision), what=what)
    made = tokenizer_spec(tokenizer, uses_chat_template=False)
    shard_rows = rounded(args.shard_rows)
    nothing = DataSpec(source="", digest=None, columns="text", mask_policy="all")
    # This spec is made only for the checks of its fields: max_length and shard_rows may be invalid.
    StoreSpec(tokenizer=made, data=nothing, max_length=max_length, shard_rows=shard_rows, num_shards=0)

    def describe_model(model: str, what: str, its_revision: str | None) -> ModelSpec:
        source, weights = source_of(name=model, revision=its_revision), args.calibrate is not None
        return check_model(source, what=what, made=made, max_length=max_length, weights=weights)[0]

    # Without --target, a model without a name takes the place of the target.
    target = ModelSpec(name="", revision="", dtype="", padded_vocab_size=made.vocab_size)
    if args.target is not None:
        target = describe_model(args.target, "target", args.target_revision)
    described = {name: describe_model(model, f"reference {name}", None) for name, model in references.items()}
    specs = [TargetSpec(model=target, scheme=scheme) for scheme in schemes]
    for spec in specs:
        spec.scheme.check_vocabulary(made.vocab_size)
        check_room(shard_rows, spec.room)
    corpus, drawn = look_at(
        args.data, tokenizer, vocab_size=made.vocab_size, max_length=max_length, shard_rows=shard_rows,
        sample_documents=max(args.sample_documents, args.calibrate or 0), calibrate=args.calibrate,
        options=storage_options(args.storage_options),
    )  # fmt: skip
    calibrated = None
    if args.calibrate is None:
        costs = [replace(assumed(spec.scheme, made.vocab_size), rows_per_s=args.rows_per_s) for spec in specs]
    else:
        costs, calibrated = _measured(args, references, target, described, specs, drawn, shard_rows, made.vocab_size)
    return plan(
        corpus,
        list(zip(specs, costs, strict=True)),
        references=list(references),
        num_actors=args.num_actors,
        price_per_gb_month=args.price_per_gb_month,
        calibrated=calibrated,
    )


def _measured(
    args: argparse.Namespace,
    references: Mapping[str, str],
    target: ModelSpec,
    described: Mapping[str, ModelSpec],
    specs: Sequence[TargetSpec],
    drawn: Drawn,
    shard_rows: int,
    vocab_size: int,
) -> tuple[list[Cost], str]:
    """Loads the models and runs documents through them.

    Returns:
        Cost of a row for each scheme in `specs`, and a description of the measurement.

    Raises:
        ValueError: A model cannot be loaded, or no document was scored by all models.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def load(model: str, what: str, spec: ModelSpec, its_revision: str | None) -> SplitLM:
        source = ModelSource(
            name=model,
            revision=its_revision,
            dtype=spec.dtype,
            attn_implementation=args.attn_implementation,
            trust_remote_code=args.trust_remote_code,
        )
        lm = SplitLM(load_model(source, what=what, device=device), vocab_size)
        check_halves(lm)
        return lm

    with loading_bars(False):
        lm = load(args.target, "target", target, args.target_revision)
        others = {name: load(references[name], f"reference {name}", spec, None) for name, spec in described.items()}
    shards = in_shards(drawn.documents, shard_rows)
    records = [tokens.record for tokens in drawn.documents]
    found = [
        calibrate(lm, others, shards, spec, shard_rows, args.batch_tokens, records=records, share=drawn.share)
        for spec in specs
    ]
    # Losses are computed on the entries that a scheme keeps, so a reference may fail with one scheme but not with
    # another. The text describes the scheme with the fewest documents.
    fewest = min(found, key=lambda one: one.documents)
    text = (
        f"{args.target} on this machine's {device}: {count_of(fewest.documents, 'document')}, "
        f"{count_of(fewest.rows, 'row')} of which {fewest.counted:,} count{'s' if fewest.counted == 1 else ''}"
    )
    if failed := len(drawn.documents) - fewest.documents:
        text += f"; {count_of(failed, 'document')} left out because a model fails on them"
    if drawn.share < 1 and fewest.records == 1:
        text += "; only one record was measured, so the variation between records is unknown"
    elif drawn.share < 1:
        text += f"; ranges of entries and bytes: two standard errors to either side, from {fewest.records:,} records"
    return [one.cost for one in found], text


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
) -> tuple[Corpus, Drawn]:
    """Tokenises records of the data as the dump would: all of them, or a sample that is drawn at random.

    Args:
        data: Path, URL or hf: name of the data, as `logitstore dump --data` takes it.
        tokenizer: Tokenizer of the documents.
        vocab_size: Size of the tokenizer's vocabulary.
        max_length: Largest number of tokens in a document.
        shard_rows: Largest number of rows in a shard.
        sample_documents: Largest number of records to tokenise.
        calibrate: Maximum number of records to return for a calibration; None for no records. Only records that have
            documents are returned, in the order in which they were drawn.
        options: Options for the data's fsspec file system, such as credentials.

    Returns:
        Number and size of the documents, and the records for a calibration.

    Raises:
        ValueError: The data are missing or malformed, or no record gives a document.
        LogitStoreError: The data cannot be reached.
    """
    source = find_source(data, options)
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="logitstore-", dir=cache) as name, progress_bars(False):
        dataset, encoder = open_encoder(source, Path(name), tokenizer, vocab_size, max_length)
        num_records = len(dataset)
        chosen = np.random.default_rng(0).permutation(num_records)[:sample_documents]
        found: list[list[Tokens]] = []
        for record, index in enumerate(chosen.tolist()):
            made = encoder(dataset[index : index + 1], [index])
            pairs = zip(made["ids"], made["mask"], strict=True)
            found.append([Tokens(ids, mask, record) for ids, mask in pairs if len(ids)])
    if not any(found):
        some = len(found) < num_records
        raise ValueError(
            f"data must hold a document of at least 2 tokens in which a prediction counts, got data={source.name} with "
            f"none in {f'{len(found):,} of ' if some else ''}{count_of(num_records, 'record')}; check the columns and "
            f"the loss mask{', or give a larger --sample_documents' if some else ''}"
        )
    # Shards are filled in the order of the data, not in the order in which records were drawn.
    in_order = [tokens for i in np.argsort(chosen) for tokens in found[i]]
    lengths = np.array([len(tokens.ids) for tokens in in_order], dtype=np.int64)
    per_record = np.array([_figures(documents) for documents in found], dtype=np.float64)
    documents, rows, counted = (_estimate(column, num_records) for column in per_record.T)
    shards = Range.exactly(len(assign_shards(lengths, shard_rows)) - 1)
    if len(found) < num_records:
        # A shard ends where the next document does not fit. On average, the unused rest of the shard is half as long as
        # that document. A long document is more likely to be the one that does not fit, hence the sum of squares.
        room = shard_rows - float((lengths.astype(float) ** 2).sum() / lengths.sum()) / 2
        shards = Range(math.ceil(rows.low / room), math.ceil(rows.high / room))
    corpus = Corpus(
        name=source.name, columns=", ".join(encoder.columns), records=num_records, sampled=len(found),
        documents=documents, rows=rows, counted=counted, shards=shards, shard_rows=shard_rows, max_length=max_length,
        vocab_size=vocab_size, token_bytes=_token_bytes(in_shards(in_order, shard_rows), shard_rows),
    )  # fmt: skip
    with_documents = [documents_ for documents_ in found if documents_]
    first = with_documents[: calibrate or 0]
    share = len(first) / len(with_documents) * (len(found) / num_records)
    return corpus, Drawn([tokens for documents_ in first for tokens in documents_], share)


def _figures(documents: Sequence[Tokens]) -> tuple[int, int, int]:
    """Returns the number of documents, rows and counted rows of one record."""
    return len(documents), sum(len(d.ids) for d in documents), sum(int(d.mask.sum()) for d in documents)


def _estimate(values: NDArray[np.float64], total: int) -> Range:
    """Estimates a sum over all records from a sample that was drawn without replacement.

    Args:
        values: Values of the records in the sample.
        total: Number of all records.

    Returns:
        The exact sum if the sample holds all records. Otherwise, the range from two standard errors below the estimate,
        but at least the sum of the sample, to two standard errors above the estimate. For a sample of one record, the
        range is from the value of this record to twice the estimate.
    """
    n = len(values)
    if n == total:
        return Range.exactly(float(values.sum()))
    error = float(values.std(ddof=1)) * math.sqrt((1 - n / total) / n) if n > 1 else math.inf
    middle, margin = float(values.mean()) * total, STANDARD_ERRORS * error * total
    # The values are not negative, so the sum over all records is at least the sum of the sample.
    return Range(max(middle - margin, float(values.sum())), middle + margin if margin < math.inf else 2 * middle)


def in_shards(documents: Sequence[Tokens], shard_rows: int) -> list[Shard]:
    """Divides documents into shards as the dump would, but keeps the shards in memory only."""
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
    """Returns the mean compressed bytes of a row, summed over the arrays of the layer `tokens`."""
    num_bytes = sum(
        encoded_bytes("tokens", encode_tokens(shard.ids, shard.loss_mask, shard.lengths), shard_rows, 1)
        for shard in shards
    )
    return num_bytes / sum(len(shard.ids) for shard in shards)
