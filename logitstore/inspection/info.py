"""Collects and formats the report of `logitstore info`: contents, progress and size of a store.

Reads the specs, the names of all commit records, and a few of these records. Reads no stored values.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from logitstore.errors import DamagedShardError, IdentityError, LayerNotFoundError
from logitstore.format import schemes
from logitstore.format.spec import LossSpec, TargetSpec
from logitstore.inspection import fidelity_report
from logitstore.inspection.measured import layer_bytes, read_measured, spread_shards
from logitstore.store.catalog import runs, spans
from logitstore.store.commits.appends import pending_append
from logitstore.store.commits.set_aside import read_set_aside

if TYPE_CHECKING:
    from collections.abc import Iterator

    from logitstore.store.catalog import Layer
    from logitstore.store.reader import Store

MEASURED_SHARDS = 16
"""Maximum number of shards of each layer whose commit records are read for the line about fidelity."""
MAX_SHOWN = 20
"""Maximum number of set-aside documents, and of set-aside shards, that are listed for each layer."""


def describe(store: Store) -> dict[str, Any]:
    """Returns the figures of `logitstore info` as JSON values. Works while the store is being written."""
    spec = store.spec
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
        "appends": _appends(store),
        "unfinished_append": _unfinished_append(store),
        "layers": {name: _layer(store, layer) for name, layer in store.layers.items()},
    }


def unfinished(store: Store) -> Iterator[str]:
    """Yields a line for each layer with missing shards, and one for an unfinished append. Neither is damage."""
    for name, layer in store.layers.items():
        if missing := layer.num_missing:
            yield f"{name}: {missing:,} of {layer.num_shards:,} shards are not committed yet ({spans(layer.gaps)})"
    if (append := _unfinished_append(store)) is not None:
        yield _render_unfinished(append)


def _render_unfinished(append: dict[str, Any]) -> str:
    what = f"append {append['number']}: under way, or left unfinished"
    if append["shards"] is None:
        return f"{what}, but its claim cannot be read; `logitstore verify --repair` gives it up"
    so_far = f"{append['source']}: {append['shards_done']:,} of {append['shards']:,} shards so far"
    return (
        f"{what} ({so_far}); the dump with the same --data and --append finishes it, `logitstore verify --repair` "
        "gives it up"
    )


def _appends(store: Store) -> list[dict[str, Any]]:
    index = store.layers["tokens"].index
    return [
        {
            "source": append.data.source,
            "first_shard": append.first_shard,
            "shards": append.num_shards,
            "documents": int(
                index.upto(append.first_shard + append.num_shards).documents.sum()
                - index.upto(append.first_shard).documents.sum()
            ),
        }
        for append in store.spec.appends
    ]


def _unfinished_append(store: Store) -> dict[str, Any] | None:
    if (pending := pending_append(store.storage, store.spec.appends)) is None:
        return None
    index = store.layers["tokens"].index
    return {
        "number": pending.number,
        "source": None if pending.append is None else pending.append.data.source,
        "shards": None if pending.append is None else pending.append.num_shards,
        # Shards after the store's last one can only belong to this append.
        "shards_done": len(index) - len(index.upto(store.spec.num_shards)),
    }


def _layer(store: Store, layer: Layer) -> dict[str, Any]:
    index = layer.index.upto(store.spec.num_shards)
    rows, counted = int(index.rows.sum()), int(index.counted.sum())
    per = rows if layer.name == "tokens" else counted  # Only rows that count have entries and losses.
    set_aside = read_set_aside(store.storage, layer.name)
    sizes = layer_bytes(store, layer.name)
    facts: dict[str, Any] = {
        "shards": len(index),
        "shards_missing": layer.num_missing,
        "missing": spans(layer.gaps),
        "shards_stale": sorted(shard for shard in layer.stale if shard < store.spec.num_shards),
        "rows": rows,
        "counted": counted,
        "entries": int(index.entries.sum()),
        "bytes": sizes,
        "bytes_per_row": {array: round(size / per, 3) if per else 0.0 for array, size in sizes.items()},
        "documents_set_aside": int(index.set_aside.sum()),
        "first_documents_set_aside": _documents_set_aside(store, layer),
        "shards_set_aside": len(set_aside),
        "first_shards_set_aside": [
            {"shard": shard, "reason": found.reason, "attempts": found.attempts, "when": found.when}
            for shard, found in list(set_aside.items())[:MAX_SHOWN]
        ],
    }
    if isinstance(layer.spec, TargetSpec | LossSpec):
        model = layer.spec.model
        facts["model"] = {"name": model.name, "revision": model.revision, "dtype": model.dtype}
    if isinstance(layer.spec, TargetSpec):
        facts["scheme"] = {"line": schemes.describe(layer.spec.scheme), **dataclasses.asdict(layer.spec.scheme)}
    if layer.name != "tokens":
        measured = read_measured(store, layer.name, spread_shards(store, layer.name, MEASURED_SHARDS))
        target = layer.spec if isinstance(layer.spec, TargetSpec) else None
        facts["fidelity"] = fidelity_report.summary(measured, target, len(index))
    return facts


def _documents_set_aside(store: Store, layer: Layer) -> list[dict[str, Any]]:
    """Returns the first MAX_SHOWN documents that were set aside, with reasons.

    Reads only the commit records that list such documents.
    """
    index = layer.index.upto(store.num_shards)
    documents = store.layers["tokens"].index.documents
    found: list[dict[str, Any]] = []
    for shard in index.shards[np.flatnonzero(index.set_aside)].tolist():
        if len(found) >= MAX_SHOWN:
            break
        try:
            commit = store.reader.commit(layer.name, shard)
        except (DamagedShardError, IdentityError, LayerNotFoundError):
            continue  # This report leaves out records that cannot be read; `verify` reports them.
        first = int(documents[:shard].sum())
        found += [{"document": first + i, "reason": reason} for i, reason in sorted(commit.set_aside.items())]
    return found[:MAX_SHOWN]


def render(facts: dict[str, Any]) -> Iterator[str]:
    """Formats the result of `describe` as lines of text."""
    tokens = facts["layers"]["tokens"]
    so_far = " so far" if tokens["shards_missing"] else ""
    yield f"{facts['url']}  (format {facts['format_version']})"
    yield (
        f"  {facts['documents']:,} documents{so_far}, {facts['rows']:,} rows of which {facts['counted']:,} count, in "
        f"{facts['shards']:,} shards of at most {facts['shard_rows']:,} rows"
    )
    yield (
        f"  from {facts['source']} (columns: {facts['columns']}, mask: {facts['mask_policy']}), at most "
        f"{facts['max_length']:,} tokens a document"
    )
    for number, append in enumerate(facts["appends"], 1):
        num_documents, num_shards = append["documents"], append["shards"]
        yield f"  append {number}: {num_documents:,} documents in {num_shards:,} shards from {append['source']}"
    yield f"  tokenizer {facts['tokenizer']} ({facts['vocab_size']:,} tokens)"
    for name, layer in facts["layers"].items():
        yield ""
        yield from _render_layer(name, layer)
    if facts["unfinished_append"] is not None:
        yield ""
        yield _render_unfinished(facts["unfinished_append"])


def _render_layer(name: str, layer: dict[str, Any]) -> Iterator[str]:
    total = layer["shards"] + layer["shards_missing"]
    # Rounded down, so that an incomplete layer never shows 100%.
    share = 100 * layer["shards"] // max(total, 1)
    some = f"{layer['shards']:,} of {total:,} shards ({share}%), missing {layer['missing']}"
    state = some if layer["shards_missing"] else "complete"
    kind = "row" if name == "tokens" else "counted row"
    yield f"{name}: {state}, {sum(layer['bytes_per_row'].values()):.2f} bytes a {kind}"
    if "model" in layer:
        model = layer["model"]
        yield f"  model     {model['name']} ({model['dtype']}, {model['revision'][:19]})"
    if "scheme" in layer:
        average = layer["entries"] / layer["counted"] if layer["counted"] else 0.0
        yield f"  scheme    {layer['scheme']['line']}; {average:.1f} entries on average"
    if layer.get("fidelity"):
        yield f"  fidelity  {layer['fidelity']}"
    if stale := layer["shards_stale"]:
        yield f"  stale     shards {spans(runs(stale))}: computed from other values; the dump computes them again"
    for array, num_bytes in layer["bytes"].items():
        yield f"  {array:<14}{num_bytes:>14,} bytes{layer['bytes_per_row'][array]:>9.2f} a {kind}"
    if num := layer["documents_set_aside"]:
        shown = layer["first_documents_set_aside"]
        yield f"  documents set aside: {num:,}; the model failed on them, and readers get them with loss mask 0"
        yield from (f"    document {one['document']:,}: {one['reason']}" for one in shown)
        if num > len(shown):
            yield f"    and {num - len(shown):,} more"
    if num := layer["shards_set_aside"]:
        shown = layer["first_shards_set_aside"]
        yield f"  shards set aside: {num:,}; every attempt failed, and the next run of the same dump tries them again"
        yield from (
            f"    shard {one['shard']} ({one['attempts']} times, {one['when']}): {one['reason']}" for one in shown
        )
        if num > len(shown):
            yield f"    and {num - len(shown):,} more"
