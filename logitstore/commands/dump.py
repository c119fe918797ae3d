"""Writes documents, a target's next-token distributions and models' losses into a store, on Ray actors.

  logitstore dump --store cache.zarr --target MODEL --data train.jsonl
  logitstore dump --store cache.zarr --reference NAME=MODEL           losses of a model on a finished store, no target
  logitstore dump --store cache.zarr --target MODEL --data more.jsonl --append      more documents
  ray job submit --working-dir . -- python jobs/dump_logits.py ...    the same on a Ray cluster

If the command ends early, run it again: committed shards are skipped, and shards that were set aside are tried again.
Exit status: 0 if everything is done; 1 if nothing can be computed, or the disk or the bucket refuses; 2 on a mistake in
the arguments (nothing was tried); 3 if documents or shards were set aside, or if another job or a repair took shards
back (all others are done).
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from logitstore.commands import shared_options as shared
from logitstore.commands.dump_summary import explain, render
from logitstore.commands.shared_options import Parser
from logitstore.commands.user_errors import command, end, leave, refusals, say, user_errors
from logitstore.errors import LayerNotFoundError, LogitStoreError
from logitstore.format.layout import losses_layer
from logitstore.format.schemes import OPTIONS, Scheme, make_scheme
from logitstore.format.spec import LossSpec, ModelSpec, StoreSpec, TargetSpec, TokenizerSpec, check_room, maker
from logitstore.storage.options import options_for, storage_options
from logitstore.storage.storage import Storage
from logitstore.store.catalog import read_attributes, stored_spec
from logitstore.store.commits.set_aside import explain_missing
from logitstore.store.reader import Store
from logitstore.store.take_back import sweep
from logitstore.store.writer import add_layer, check_layer

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from logitstore.dump.plan import DumpPlan
    from logitstore.models.loading import ModelSource


def parser() -> Parser:
    """Returns the parser of the command line."""
    p = Parser(prog="logitstore dump", description=__doc__)
    shared.add_store(p, required=True, text="folder or fsspec URL of the store; created if missing")
    shared.add_storage_options(p)

    data = p.add_argument_group("documents (not needed once a store has them)")
    data.add_argument("--data", metavar="DATA", help=shared.DATA)
    shared.add_switch(data, "--append", "add the documents to a store that holds other documents")
    data.add_argument("--tokenizer", metavar="MODEL", help="tokenizer of the documents. Default: the target's")
    data.add_argument("--max_length", type=int, metavar="N", help="maximum number of tokens of a document; "
                      "longer ones are cut into windows. "
                      f"Default: {shared.MAX_LENGTH}, or the target's context if that is less")  # fmt: skip
    data.add_argument("--shard_rows", type=int, metavar="N",
                      help=f"maximum number of rows of a shard. Default: {shared.SHARD_ROWS}, or as in the "
                      "store")  # fmt: skip
    data.add_argument("--num_proc", type=int, default=os.cpu_count() or 1, metavar="N",
                      help="number of processes that tokenise. Default: the number of CPUs")  # fmt: skip

    models = p.add_argument_group("models")
    shared.add_target(models, "Hugging Face id or folder of the target")
    shared.add_references(
        models, "add the layer losses/NAME, computed with MODEL; may be repeated, with or without --target"
    )
    shared.add_loading(models)

    rows = p.add_argument_group("entries of a row")
    rows.add_argument("--scheme", default="topk", choices=tuple(OPTIONS),
                      help="which entries a row keeps (docs/getting_started.md). Default: %(default)s")  # fmt: skip
    shared.add_scheme_options(rows)
    rows.add_argument("--max_kl", type=float, metavar="NATS",
                      help="topk, nucleus: stop at the first shard whose rows would lose more nats than this on "
                      "average, measured on a sample of the rows. Default: no limit")  # fmt: skip

    work = p.add_argument_group("work")
    work.add_argument("--num_actors", type=int, metavar="N",
                      help="number of Ray actors, each with its own copy of the models. Default: one per GPU, or one "
                      "without GPUs")  # fmt: skip
    work.add_argument("--gpus_per_actor", type=float, metavar="X",
                      help="GPUs of each actor; a fraction shares a GPU, 0 computes on the CPU. "
                      "Default: 1 if there are GPUs, otherwise 0")  # fmt: skip
    work.add_argument("--cpus_per_actor", type=float, metavar="X",
                      help="CPUs of each actor. Default: 1 with a GPU, else an equal share of all CPUs")  # fmt: skip
    shared.add_batch_tokens(work)
    shared.add_switch(
        work,
        "--retry_set_aside",
        "also try set-aside documents again (set-aside shards are always tried again)",
    )
    shared.add_no_progress(work)
    shared.add_json(work)
    return p


def run(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the dump and returns its figures, which `main` prints.

    Ends the process with one line of text if an argument is wrong, or if nothing can be computed or written.
    """
    with user_errors():
        args = parser().parse_args(argv)
    return dump(args)


def dump(args: argparse.Namespace) -> dict[str, Any]:
    """Runs a dump with parsed arguments; see `run`."""
    # These imports take seconds, so they come after the arguments were parsed.
    from logitstore.cluster.resources import join_cluster
    from logitstore.dump.dispatcher import find_missing, run_dump
    from logitstore.dump.plan import DumpError

    with user_errors():
        scheme, references = _check(args)
        storage = Storage(args.store, storage_options(args.storage_options))
        store, target, described = _documents(args, storage, scheme, references)
        if args.target is None and references:
            _check_target_complete(store)
        wanted: dict[str, TargetSpec | LossSpec] = {}
        if target is not None:
            wanted["target"] = TargetSpec(model=target, scheme=scheme)
        wanted |= {losses_layer(name): LossSpec(model=spec) for name, spec in described.items()}
        # All layers are checked before the first one is added, so that a refusal leaves the store as it was.
        for layer, layer_spec in wanted.items():
            check_layer(storage, layer, layer_spec)
        with refusals():
            for layer, layer_spec in wanted.items():
                add_layer(storage, store.spec, layer, layer_spec)
        if any(layer not in store.layers or store.layers[layer].spec != spec for layer, spec in wanted.items()):
            store = Store(storage)  # Opened again, now with the layers that were added.
    plan = _plan(args, target, references, described, wanted)
    summary: dict[str, Any] = {
        "store": storage.url,
        "documents": store.num_documents,
        "store_rows": store.num_rows,
        "counted_rows": store.num_counted,
    }
    # Without a model, the command only prepares documents.
    if not wanted:
        with refusals():
            sweep(storage)
        return summary
    try:
        missing = find_missing(store, plan)
        if missing.shards:
            with user_errors():
                join_cluster()
        report = run_dump(store, plan, missing, progress=not args.no_progress)
        sizes = {layer: storage.num_bytes(layer) for layer in wanted}
    except (DumpError, LogitStoreError) as error:
        end(error, 1)
    return summary | {
        "layers": list(wanted),
        "rows": report.rows,
        "entries": report.entries,
        "seconds": round(report.seconds, 2),
        "rows_per_second": round(report.rows / report.seconds, 1) if report.rows else 0.0,
        "shards_done": report.shards_done,
        "shards_skipped": report.shards_skipped,
        "bytes": sizes,
        # Only rows that count have entries and losses.
        "bytes_per_counted_row": {
            layer: round(size / max(report.counted[layer], 1), 2) for layer, size in sizes.items()
        },
        "set_aside": {
            "shards": {str(shard): reason for shard, reason in sorted(report.failed.items())},
            "documents": {
                layer: {str(number): reason for number, reason in named.items()}
                for layer, named in report.documents.items()
            },
        },
        "documents_set_aside": report.num_documents,
        "stale": report.stale,
        "missing": report.missing,
    }


@command("finished shards are kept; run the same command again to go on", extra="dump")
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    with user_errors():
        args = parser().parse_args(argv)
    summary = dump(args)
    if args.json:
        print(json.dumps(summary, indent=1))
    else:
        say(render(summary, args.target))
    return explain(summary)


def _check(args: argparse.Namespace) -> tuple[Scheme, dict[str, str]]:
    """Checks the arguments as far as possible without opening anything.

    Returns:
        The scheme, and a dictionary from the name of each reference to its model.

    Raises:
        ValueError: An argument is out of range, or two arguments do not fit each other.
    """
    references = parse_references(args.reference)
    scheme = make_scheme(args.scheme, {name: getattr(args, name) for options in OPTIONS.values() for name in options})
    for name in ("num_actors", "cpus_per_actor", "batch_tokens", "num_proc"):
        if (value := getattr(args, name)) is not None and value <= 0:
            raise ValueError(f"{name} must be above 0, got {name}={value}")
    if args.gpus_per_actor is not None and args.gpus_per_actor < 0:
        raise ValueError(f"gpus_per_actor must be at least 0, got gpus_per_actor={args.gpus_per_actor}")
    if not args.target and not references and not args.data:
        raise ValueError("target, reference or data must be given, got none of them; add one or more of the flags")
    if args.append and not args.data:
        raise ValueError("append needs --data, got --append without it; add --data")
    if args.append and references and not args.target:
        raise ValueError("append with --reference needs --target, got none; add --target, or append the documents "
                         "first and add their losses in a second dump")  # fmt: skip
    if args.max_kl is not None and not 0 < args.max_kl < float("inf"):
        raise ValueError(f"max_kl must be above 0 and finite, got max_kl={args.max_kl}; 0.5 is usual")
    if args.max_kl is not None and not args.target:
        raise ValueError(f"max_kl needs --target, got max_kl={args.max_kl} without it; add --target, or omit --max_kl")
    if args.max_kl is not None and scheme.draws:
        raise ValueError(
            f"max_kl needs --scheme topk or nucleus, got max_kl={args.max_kl} with {scheme.name}; omit --max_kl (on "
            "average, entries drawn at random lose nothing; `logitstore fidelity` shows their noise)"
        )
    return scheme, references


def parse_references(given: Sequence[str]) -> dict[str, str]:
    """Parses the values of `--reference`.

    Returns:
        A dictionary from the name of each reference to its model.

    Raises:
        ValueError: A value is not NAME=MODEL, a name is given twice, or a name is not valid in losses/NAME.
    """
    models: dict[str, str] = {}
    for value in given:
        name, separator, model = value.partition("=")
        if not separator or not model:
            raise ValueError(
                f"reference must be NAME=MODEL, got reference={value}; example: --reference ref=path/to/model"
            )
        losses_layer(name)
        if name in models:
            raise ValueError(f"reference names must differ, got {name} twice; give each model its own name")
        models[name] = model
    return models


def _plan(
    args: argparse.Namespace,
    target: ModelSpec | None,
    references: dict[str, str],
    described: dict[str, ModelSpec],
    wanted: dict[str, TargetSpec | LossSpec],
) -> DumpPlan:
    from logitstore.dump.plan import DumpPlan

    def source(name: str, revision: str | None, spec: ModelSpec) -> ModelSource:
        # Actors may run in another folder, so a relative path would not be found.
        absolute = str(Path(name).resolve()) if Path(name).is_dir() else name
        return replace(shared.source_of(args, absolute, revision), dtype=spec.dtype)

    return DumpPlan(
        target=None if target is None else source(args.target, args.target_revision, target),
        references={name: source(model, None, described[name]) for name, model in references.items()},
        made_by={layer: maker(layer_spec) for layer, layer_spec in wanted.items()},
        retry_set_aside=args.retry_set_aside,
        num_actors=args.num_actors,
        gpus_per_actor=args.gpus_per_actor,
        cpus_per_actor=args.cpus_per_actor,
        batch_tokens=args.batch_tokens,
        max_kl=args.max_kl,
    )


def _documents(
    args: argparse.Namespace, storage: Storage, scheme: Scheme, references: dict[str, str]
) -> tuple[Store, ModelSpec | None, dict[str, ModelSpec]]:
    """Checks that all models fit the documents' tokenizer. Then prepares the documents, or opens the prepared store.

    Returns:
        The store, the target's spec (None without --target), and the references' specs by name.
    """
    from logitstore.models.identity import check_model, tokenizer_spec
    from logitstore.models.loading import load_tokenizer

    def check(made: TokenizerSpec, max_length: int, shard_rows: int) -> tuple[ModelSpec | None, dict[str, ModelSpec]]:
        def describe(name: str, what: str, revision: str | None) -> ModelSpec:
            source = shared.source_of(args, name, revision)
            return check_model(source, what=what, made=made, max_length=max_length)[0]

        if args.target is not None:
            scheme.check_vocabulary(made.vocab_size)
        target = None if args.target is None else describe(args.target, "target", args.target_revision)
        others = {name: describe(model, f"reference {name}", None) for name, model in references.items()}
        # These checks are made now, because tokenising the documents afterwards may take an hour.
        if target is not None:
            target_spec = TargetSpec(model=target, scheme=scheme)
            check_room(shard_rows, target_spec.room)
            check_layer(storage, "target", target_spec)
        for name, spec in others.items():
            check_layer(storage, losses_layer(name), LossSpec(model=spec))
        return target, others

    if args.data is None:
        store = Store(storage)
        if missing := store.layers["tokens"].num_missing:
            raise LayerNotFoundError(
                f"tokens must be complete, got {missing} of {store.spec.num_shards} shards missing in "
                f"{store.url}; give --data again to write the missing documents"
            )
        return store, *check(store.spec.tokenizer, store.spec.max_length, store.spec.shard_rows)
    from logitstore.documents.prepare import prepare

    name = args.tokenizer or args.target
    if name is None:
        raise ValueError("data needs --target or --tokenizer, got --data without either; add --tokenizer")
    revision = args.target_revision if name == args.target else None
    tokenizer = load_tokenizer(shared.source_of(args, name, revision), what="tokenizer" if args.tokenizer else "target")
    attributes = read_attributes(storage, "")
    stored = None if attributes is None else stored_spec(StoreSpec, attributes, "store")
    max_length = choose_max_length(args, stored)
    shard_rows = args.shard_rows
    if shard_rows is None:
        shard_rows = shared.SHARD_ROWS if stored is None else stored.shard_rows
    target, others = check(tokenizer_spec(tokenizer, uses_chat_template=False), max_length, shard_rows)
    with refusals():
        store = prepare(
            storage,
            args.data,
            tokenizer,
            max_length=max_length,
            shard_rows=shard_rows,
            num_proc=args.num_proc,
            append=args.append,
            storage_options=options_for(args.data, args.store, storage_options(args.storage_options)),
            progress=not args.no_progress,
        )
    return store, target, others


def choose_max_length(args: argparse.Namespace, stored: StoreSpec | None) -> int:
    """Returns the maximum number of tokens of a document.

    This is --max_length if it is given, otherwise the value of the store. For a new store, it is the default, or the
    target's context length if that is smaller.
    """
    from logitstore.models.loading import load_config

    if args.max_length is not None:
        return int(args.max_length)
    if stored is not None:
        return stored.max_length
    context = None
    if args.target is not None:
        config = load_config(shared.source_of(args, args.target, args.target_revision), what="target")
        context = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(shared.MAX_LENGTH, context or shared.MAX_LENGTH)


def _check_target_complete(store: Store) -> None:
    if "target" not in store.layers:
        raise LayerNotFoundError(
            f"store must have target rows before losses are added, got {store.url} without any; give --target too"
        )
    target = store.layers["target"]
    if target.num_missing or target.stale:
        raise LayerNotFoundError(
            f"target must be complete before losses are added, got {target.num_missing} of {store.spec.num_shards} "
            f"shards missing and {len(target.stale)} stale in {store.url}; run the dump with --target again"
            f"{explain_missing(store.storage, 'target')}"
        )


if __name__ == "__main__":
    leave(main())
