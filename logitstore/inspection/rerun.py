"""The commands that write again what `logitstore verify --repair` took back."""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING

from logitstore.format import schemes
from logitstore.format.spec import StoreSpec

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from logitstore.format.spec import ModelSpec, TargetSpec
    from logitstore.store.reader import Store

JOB = "python jobs/dump_logits.py"


def commands(store: Store, shards: Collection[tuple[str, int]]) -> list[str]:
    """Returns command lines that write shards again, those of tokens first.

    Args:
        store: The store as it was before they were taken back.
        shards: Layer and number of each.
    """
    layers = {layer for layer, _ in shards}
    lines = [
        [JOB, "--store", store.url, "--data", source, "--tokenizer", store.spec.tokenizer.name, *_sizes(store.spec)]
        for source in _sources(store.spec, {shard for layer, shard in shards if layer == "tokens"})
    ]
    parts: dict[str, list[str]] = {}  # by dtype: one command knows one
    for model, flags in [*_target(store.spec.target, layers), *_references(store.spec, layers)]:
        parts.setdefault(model.dtype, []).extend(flags)
    lines += [[JOB, "--store", store.url, *flags, "--dtype", dtype] for dtype, flags in parts.items()]
    return [f"{line[0]} {shlex.join(line[1:])}" for line in lines]


def _sources(spec: StoreSpec, shards: Collection[int]) -> list[str]:
    """Lists the data that shards of tokens came from: the store's first, then those that were appended."""
    starts = [(0, spec.data.source), *((append.first_shard, append.data.source) for append in spec.appends)]
    return list(dict.fromkeys([source for first, source in starts if first <= shard][-1] for shard in sorted(shards)))


def _sizes(spec: StoreSpec) -> list[str]:
    default = StoreSpec.__dataclass_fields__["shard_rows"].default
    return [] if spec.shard_rows == default else ["--shard_rows", str(spec.shard_rows)]


def _target(target: TargetSpec | None, layers: Collection[str]) -> Iterator[tuple[ModelSpec, list[str]]]:
    if target is None or "target" not in layers:
        return
    revision = target.model.revision
    flags = ["--target", target.model.name]
    if re.fullmatch("[0-9a-f]{40}", revision):
        flags += ["--revision", revision]
    yield target.model, [*flags, *schemes.flags(target.scheme)]


def _references(spec: StoreSpec, layers: Collection[str]) -> Iterator[tuple[ModelSpec, list[str]]]:
    for name, loss in spec.losses.items():
        if f"losses/{name}" in layers:
            yield loss.model, ["--reference", f"{name}={loss.model.name}"]
