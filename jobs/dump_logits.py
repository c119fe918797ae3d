"""Writes documents, the target's rows and references' losses into a store, on Ray actors.

    python jobs/dump_logits.py --store cache.zarr --target MODEL --data train.jsonl
    ray job submit --working-dir . -- python jobs/dump_logits.py --store s3://bucket/cache.zarr --target MODEL \
        --data hf:NAME
    python jobs/dump_logits.py --store cache.zarr --reference NAME=MODEL        losses on a finished store, no target

    python jobs/dump_logits.py --store cache.zarr --target MODEL --data more.jsonl --append     more documents

Run the same command again to go on after any kind of end: committed shards are skipped, those that were set aside are
tried again. Exit status: 0 done; 1 nothing can be computed, or the disk or the bucket refuses; 2 a mistake in the
arguments, nothing was tried; 3 documents or shards were set aside, or taken back meanwhile by another job or a repair,
all others are done.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from _errors import end, refusals, user_errors
from _set_aside import explain

from logitstore.arguments import Parser
from logitstore.errors import LayerNotFoundError, LogitStoreError
from logitstore.format.layout import losses_layer
from logitstore.format.schemes import OPTIONS, Scheme, make_scheme
from logitstore.format.spec import LossSpec, ModelSpec, TargetSpec, TokenizerSpec, check_room, maker
from logitstore.models.identity import check_model, tokenizer_spec
from logitstore.models.loading import ModelSource, load_config, load_tokenizer
from logitstore.storage.options import options_for, storage_options
from logitstore.storage.storage import Storage
from logitstore.store.catalog import read_attributes
from logitstore.store.commits.set_aside import explain_missing
from logitstore.store.reader import Store
from logitstore.store.take_back import sweep
from logitstore.store.writer import add_layer, check_layer


def parser() -> Parser:
    """Returns the command line."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--store", required=True, metavar="URL", help="folder or fsspec URL of the store, made if missing")
    p.add_argument("--storage_options", metavar="FILE", help="JSON file of fsspec options for the store's file system")

    data = p.add_argument_group("documents (not needed once a store has them)")
    data.add_argument("--data", metavar="DATA", help="path or URL of JSONL, Parquet or text, or hf:name[:split]")
    data.add_argument("--append", action="store_true", help="add the documents to a store that has others")
    data.add_argument("--tokenizer", metavar="MODEL", help="default: the target's")
    data.add_argument("--max_length", type=int, help="tokens of a document; longer ones become windows "
                      "(default: 2048, or the target's context where that is less)")  # fmt: skip
    data.add_argument("--shard_rows", type=int, help="most rows of a shard (default: 262144, or as in the store)")
    data.add_argument("--num_proc", type=int, default=os.cpu_count() or 1, help="processes that tokenise")

    models = p.add_argument_group("models")
    models.add_argument("--target", metavar="MODEL", help="Hugging Face id or folder of the target")
    models.add_argument("--revision", help="the target's branch, tag or commit")
    models.add_argument("--reference", action="append", default=[], metavar="NAME=MODEL",
                        help="adds losses/NAME of a model; repeatable, with or without --target")  # fmt: skip
    models.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"),
                        help="of all models' weights; auto takes each checkpoint's")  # fmt: skip
    models.add_argument("--attn_implementation", help="of transformers: sdpa, eager, flash_attention_2, ...")
    models.add_argument("--trust_remote_code", action="store_true", help="run code from the models' repositories")

    rows = p.add_argument_group("what a row keeps")
    rows.add_argument("--scheme", default="topk", choices=tuple(OPTIONS))
    rows.add_argument("--k", type=int, help="topk, nucleus: most entries of a row (default 64)")
    rows.add_argument("--mass", type=float, help="nucleus: probability that the entries reach (default 0.98)")
    rows.add_argument("--k_min", type=int, help="nucleus: fewest entries of a row (default 4)")
    rows.add_argument("--num_draws", type=int,
                      help="sample: draws of each row; hybrid: 1 / what each stands for (default 50)")  # fmt: skip
    rows.add_argument("--seed", type=int, help="sample, hybrid: of the draws (default 0)")

    rows.add_argument("--max_kl", type=float, metavar="NATS",
                      help="topk, nucleus: stop as soon as storing loses more than this of a row, on average over "
                      "those measured of a shard (docs/fidelity.md); default: any")  # fmt: skip

    p.add_argument("--retry_set_aside", action="store_true",
                   help="try documents again that were set aside; shards that were need no flag")  # fmt: skip

    cluster = p.add_argument_group("cluster")
    cluster.add_argument("--num_actors", type=int, help="default: one per GPU, or one without GPUs")
    cluster.add_argument("--gpus_per_actor", type=float, help="share of a GPU per actor, 0 for the CPU")
    cluster.add_argument("--cpus_per_actor", type=float, help="default: 1 beside a GPU, else all CPUs shared out")
    cluster.add_argument("--batch_tokens", type=int, default=16384,
                         help="most tokens of a forward, padding included (default %(default)s)")  # fmt: skip
    cluster.add_argument("--no_progress", action="store_true", help="no progress bars")
    return p


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the job; returns its figures, which the command line prints as JSON."""
    with user_errors():
        args = parser().parse_args(argv)
    # Slow imports wait until the arguments are known to parse.
    import ray

    from logitstore.dump.dispatcher import needs_models, run_dump
    from logitstore.dump.plan import DumpError, DumpPlan

    with user_errors():
        storage = Storage(args.store, storage_options(args.storage_options))
        sources = _references(args.reference)
        given = {name: getattr(args, name) for options in OPTIONS.values() for name in options}
        scheme = make_scheme(args.scheme, given)
        for name in ("num_actors", "cpus_per_actor", "batch_tokens", "num_proc"):
            if (value := getattr(args, name)) is not None and value <= 0:
                raise ValueError(f"{name} must be above 0, got {name}={value}")
        if args.gpus_per_actor is not None and args.gpus_per_actor < 0:
            raise ValueError(f"gpus_per_actor must be at least 0, got gpus_per_actor={args.gpus_per_actor}")
        if not args.target and not sources and not args.data:
            raise ValueError("target must be given, got none; give --target, --reference or --data to say what to do")
        if args.append and not args.data:
            raise ValueError("data must be given with --append, got none; give --data")
        if args.append and sources and not args.target:
            raise ValueError("target must be given with --append and --reference, got none: losses need its rows; "
                             "give --target, or append first")  # fmt: skip
        if args.max_kl is not None and not 0 < args.max_kl < float("inf"):
            raise ValueError(f"max_kl must be above 0 and finite, got max_kl={args.max_kl}; 0.5 is usual")
        if args.max_kl is not None and not args.target:
            raise ValueError(f"max_kl must be left out without --target, got max_kl={args.max_kl}; it is of its rows")
        if args.max_kl is not None and scheme.draws:
            raise ValueError(f"max_kl must be left out with --scheme {scheme.name}, got max_kl={args.max_kl}: draws "
                             "lose nothing on average; `logitstore fidelity` shows their noise")  # fmt: skip
        store, target, references = _documents(args, storage, scheme, sources)
        if args.target is None and sources:
            _check_target_complete(store)
        wanted: dict[str, TargetSpec | LossSpec] = {}
        if target is not None:
            wanted["target"] = TargetSpec(model=target, scheme=scheme)
        wanted |= {losses_layer(name): LossSpec(model=spec) for name, spec in references.items()}
        for layer, layer_spec in wanted.items():
            check_layer(storage, layer, layer_spec)
        with refusals():
            for layer, layer_spec in wanted.items():
                add_layer(storage, store.spec, layer, layer_spec)

    def source(name: str, revision: str | None, spec: ModelSpec) -> ModelSource:
        # Actors may run in another folder.
        there = str(Path(name).resolve()) if Path(name).is_dir() else name
        return replace(_source(args, there, revision), dtype=spec.dtype)

    plan = DumpPlan(
        target=None if target is None else source(args.target, args.revision, target),
        references={name: source(model, None, references[name]) for name, model in sources.items()},
        made_by={layer: maker(layer_spec) for layer, layer_spec in wanted.items()},
        retry_set_aside=args.retry_set_aside,
        num_actors=args.num_actors,
        gpus_per_actor=args.gpus_per_actor,
        cpus_per_actor=args.cpus_per_actor,
        batch_tokens=args.batch_tokens,
        max_kl=args.max_kl,
    )
    summary: dict[str, Any] = {
        "store": storage.url,
        "documents": store.num_documents,
        "store_rows": store.num_rows,
        "counted_rows": store.num_counted,
    }
    if not wanted:
        with refusals():
            sweep(storage)
        return summary
    try:
        if needs_models(storage, plan) and not ray.is_initialized():
            # No address: a submitted job joins its cluster, RAY_ADDRESS is heeded, otherwise a local Ray starts.
            ray.init(logging_level=logging.ERROR)
        report = run_dump(storage, plan, progress=not args.no_progress)
        sizes = {layer: storage.num_bytes(layer) for layer in wanted}
    except (DumpError, LogitStoreError) as error:
        end(error, 1)
    summary |= {
        "layers": list(wanted),
        "rows": report.rows,
        "entries": report.entries,
        "seconds": round(report.seconds, 2),
        "rows_per_second": round(report.rows / report.seconds, 1) if report.rows else 0.0,
        "shards_done": report.shards_done,
        "shards_skipped": report.shards_skipped,
        # Only rows that count have entries and losses.
        "bytes_per_counted_row": {layer: round(size / store.num_counted, 2) for layer, size in sizes.items()},
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
    return summary


def _source(args: argparse.Namespace, name: str, revision: str | None) -> ModelSource:
    return ModelSource(
        name=name,
        revision=revision,
        dtype=args.dtype,
        attn_implementation=args.attn_implementation,
        trust_remote_code=args.trust_remote_code,
    )


def _references(given: list[str]) -> dict[str, str]:
    sources: dict[str, str] = {}
    for value in given:
        name, separator, model = value.partition("=")
        if not separator or not model:
            raise ValueError(f"reference must be NAME=MODEL, got reference={value}; such as --reference ref=path/to/it")
        losses_layer(name)
        if name in sources:
            raise ValueError(f"reference names must differ, got {name} twice; give each model its own name")
        sources[name] = model
    return sources


def _documents(
    args: argparse.Namespace, storage: Storage, scheme: Scheme, sources: dict[str, str]
) -> tuple[Store, ModelSpec | None, dict[str, ModelSpec]]:
    """Checks all models against the documents' tokenizer, then prepares the documents or opens the prepared store.

    Returns:
        The store, and what the target and the references are.
    """

    def check(made: TokenizerSpec, max_length: int, shard_rows: int) -> tuple[ModelSpec | None, dict[str, ModelSpec]]:
        def describe(name: str, what: str, revision: str | None) -> ModelSpec:
            return check_model(_source(args, name, revision), what=what, made=made, max_length=max_length)[0]

        if args.target is not None:
            scheme.check_vocabulary(made.vocab_size)
        target = None if args.target is None else describe(args.target, "target", args.revision)
        references = {name: describe(model, f"reference {name}", None) for name, model in sources.items()}
        # Before an hour of tokenising, not after it.
        if target is not None:
            target_spec = TargetSpec(model=target, scheme=scheme)
            check_room(shard_rows, target_spec.room)
            check_layer(storage, "target", target_spec)
        for name, spec in references.items():
            check_layer(storage, losses_layer(name), LossSpec(model=spec))
        return target, references

    if args.data is None:
        store = Store(storage)
        if missing := store.layers["tokens"].num_missing:
            raise LayerNotFoundError(
                f"tokens must be complete, got {missing} of {store.spec.num_shards} shards missing in "
                f"{store.url}; give --data again to finish preparing"
            )
        return store, *check(store.spec.tokenizer, store.spec.max_length, store.spec.shard_rows)
    from logitstore.documents.prepare import prepare

    name = args.tokenizer or args.target
    if name is None:
        raise ValueError("tokenizer must be given with --data where there is no --target, got none; give --tokenizer")
    revision = args.revision if name == args.target else None
    tokenizer = load_tokenizer(_source(args, name, revision), what="tokenizer" if args.tokenizer else "target")
    max_length, shard_rows = _max_length(args, storage), _shard_rows(args, storage)
    target, references = check(tokenizer_spec(tokenizer, uses_chat_template=False), max_length, shard_rows)
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
    return store, target, references


def _shard_rows(args: argparse.Namespace, storage: Storage) -> int:
    if args.shard_rows is not None:
        return int(args.shard_rows)
    return Store(storage).spec.shard_rows if read_attributes(storage, "") is not None else 2**18


def _max_length(args: argparse.Namespace, storage: Storage) -> int:
    if args.max_length is not None:
        return int(args.max_length)
    if read_attributes(storage, "") is not None:
        return Store(storage).spec.max_length
    context = None
    if args.target is not None:
        config = load_config(_source(args, args.target, args.revision), what="target")
        context = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(2048, context or 2048)


def _check_target_complete(store: Store) -> None:
    if "target" not in store.layers:
        raise LayerNotFoundError(f"store must have target rows for losses, got {store.url} without; give --target too")
    target = store.layers["target"]
    if target.num_missing or target.stale:
        raise LayerNotFoundError(
            f"target must be complete for losses, got {target.num_missing} of {store.spec.num_shards} shards missing "
            f"and {len(target.stale)} stale in {store.url}; run the dump with --target again to finish it"
            f"{explain_missing(store.storage, 'target')}"
        )


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    result = main()
    print(json.dumps(result, indent=1))
    raise SystemExit(explain(result))
