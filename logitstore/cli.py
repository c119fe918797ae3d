"""The `logitstore` command: look at a store, check a store. Computing is done by the jobs."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from logitstore.errors import DamagedShardError, LogitStoreError
from logitstore.layout import layer_arrays
from logitstore.reader import Store
from logitstore.spec import LossSpec, TargetSpec
from logitstore.storage import Storage, read_options
from logitstore.verify import places, verify

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, 1 if `verify` found damage, 2 on a mistake."""
    parser = argparse.ArgumentParser(prog="logitstore", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    info = commands.add_parser("info", help="what a store holds, how far it is, what it costs")
    info.add_argument("--json", action="store_true", help="print JSON instead of text")
    check = commands.add_parser("verify", help="read every committed byte; exit status 1 if any is not as committed")
    check.add_argument("--num_threads", type=int, default=4, help="shards read at once (default %(default)s)")
    for command in (info, check):
        command.add_argument("url", metavar="URL", help="folder or fsspec URL of the store")
        command.add_argument("--storage_options", metavar="FILE", help="JSON file of fsspec options")
    args = parser.parse_args(argv)
    try:
        storage = Storage(args.url, read_options(args.storage_options))
        try:
            store = Store(storage)
        except DamagedShardError as error:  # a store whose tokens' commits are damaged cannot even be numbered
            print(f"{error.layer}/{error.shard}: {error.reason}")
            return 1
        return _info(store, storage, as_json=args.json) if args.command == "info" else _verify(store, args.num_threads)
    except (LogitStoreError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def describe(store: Store, storage: Storage) -> dict[str, Any]:
    """Collects what `info` shows, as JSON values."""
    spec = store.spec
    layers = {}
    for name, layer in store.layers.items():
        commits = [store.commit(name, shard) for shard in sorted(layer.committed)]
        rows, counted = (sum(getattr(commit, name) for commit in commits) for name in ("rows", "counted"))
        # Only rows that count have entries and losses; tokens are there for all.
        per = rows if name == "tokens" else counted
        arrays = {array.name: storage.num_bytes(f"{name}/{array.name}") for array in layer_arrays(name)}
        layers[name] = {
            "shards": len(layer.committed),
            "shards_missing": len(layer.missing),
            "rows": rows,
            "counted": counted,
            "entries": sum(commit.entries for commit in commits),
            "bytes": arrays,
            "bytes_per_row": {array: round(size / per, 3) if per else 0.0 for array, size in arrays.items()},
            "seconds": round(sum(commit.seconds for commit in commits), 1),
        }
        if isinstance(layer.spec, TargetSpec | LossSpec):
            model = layer.spec.model
            layers[name]["model"] = {"name": model.name, "revision": model.revision, "dtype": model.dtype}
        if isinstance(layer.spec, TargetSpec):
            scheme = layer.spec.scheme
            layers[name]["scheme"] = {"name": scheme.name, "k": scheme.k, "mass": scheme.mass, "k_min": scheme.k_min}
    return {
        "url": store.url,
        "format_version": spec.format_version,
        "documents": store.num_documents,
        "rows": store.num_rows,
        "counted": store.num_counted,
        "shards": spec.num_shards,
        "shard_rows": spec.shard_rows,
        "max_length": spec.max_length,
        "source": spec.data.source,
        "columns": spec.data.columns,
        "mask_policy": spec.data.mask_policy,
        "tokenizer": spec.tokenizer.name,
        "vocab_size": spec.tokenizer.vocab_size,
        "layers": layers,
    }


def _info(store: Store, storage: Storage, *, as_json: bool) -> int:
    facts = describe(store, storage)
    if as_json:
        print(json.dumps(facts, indent=1))
        return 0
    print(f"{facts['url']}  (format {facts['format_version']})")
    print(f"  {facts['documents']:,} documents, {facts['rows']:,} rows of which {facts['counted']:,} count, in "
          f"{facts['shards']:,} shards of at most {facts['shard_rows']:,} rows")  # fmt: skip
    print(f"  from {facts['source']} (columns: {facts['columns']}, mask: {facts['mask_policy']}), "
          f"at most {facts['max_length']:,} tokens a document")  # fmt: skip
    print(f"  tokenizer {facts['tokenizer']} ({facts['vocab_size']:,} tokens)")
    for name, layer in facts["layers"].items():
        total = layer["shards"] + layer["shards_missing"]
        state = "complete" if not layer["shards_missing"] else f"{layer['shards']} of {total} shards"
        kind = "row" if name == "tokens" else "counted row"
        print(f"\n{name}: {state}, {sum(layer['bytes_per_row'].values()):.2f} bytes a {kind}")
        if "model" in layer:
            model = layer["model"]
            print(f"  model    {model['name']} ({model['dtype']}, {model['revision'][:19]})")
        if "scheme" in layer:
            scheme = layer["scheme"]
            nucleus = f", mass {scheme['mass']:g}, at least {scheme['k_min']}" if scheme["name"] == "nucleus" else ""
            average = layer["entries"] / layer["counted"] if layer["counted"] else 0.0
            print(f"  scheme   {scheme['name']}, at most {scheme['k']} entries{nucleus}; {average:.1f} on average")
        for array, num_bytes in layer["bytes"].items():
            print(f"  {array:<14}{num_bytes:>14,} bytes{layer['bytes_per_row'][array]:>9.2f} a {kind}")
    return 0


def _verify(store: Store, num_threads: int) -> int:
    if num_threads < 1:
        raise ValueError(f"num_threads must be at least 1, got num_threads={num_threads}")
    total = len(places(store))
    with tqdm(total=total, desc="verify", unit="shard", mininterval=0.5) as bar:
        problems = verify(store, num_threads=num_threads, progress=bar.update)
    for problem in problems:
        print(f"{problem.layer}/{problem.shard}: {problem.reason}")
    unfinished = {name: len(layer.missing) for name, layer in store.layers.items() if layer.missing}
    for name, missing in unfinished.items():
        print(f"{name}: {missing} of {store.spec.num_shards} shards not committed yet")
    print(f"{total - len(problems)} of {total} committed shards are as committed")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
