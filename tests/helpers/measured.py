"""Stores dumped with each scheme, including the fidelity measurements, without Ray."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import logitstore
from logitstore.dump.worker import ShardDumper
from logitstore.format.schemes import Scheme
from logitstore.models.loading import ModelSource
from logitstore.storage.storage import Storage
from logitstore.store import writer

SCHEMES = {
    "topk": Scheme(k=12),
    "nucleus": Scheme(name="nucleus", k=64, mass=0.8, k_min=2),
    "sample": Scheme(name="sample", k=0, num_draws=20, seed=3),
    "hybrid": Scheme(name="hybrid", k=0, num_draws=20, seed=3),
}
LAYERS = ["target", "losses/reference"]


def emptied(tiny_store, url, scheme):
    """Makes a store with the same tokens and empty layers for rows of another scheme."""
    shutil.copytree(tiny_store, url)
    for folder in ("target", "losses", "commits/target", "commits/losses"):
        shutil.rmtree(Path(url, folder))
    spec = logitstore.open(url).spec
    whole = logitstore.open(tiny_store).spec
    target = replace(whole.target, scheme=scheme)
    writer.add_layer(Storage(url), spec, "target", target)
    spec = replace(spec, target=target)
    writer.add_layer(Storage(url), spec, "losses/reference", whole.losses["reference"])
    return url


def dumper(url, tiny, *, batch_tokens=700, dtype="auto", target=None, max_kl=None):
    sources = ModelSource(name=target or tiny.target, dtype=dtype), {"reference": ModelSource(name=tiny.reference)}
    return ShardDumper(Storage(url), *sources, batch_tokens=batch_tokens, device="cpu", max_kl=max_kl)


def make(tiny, tiny_store, folder):
    """Makes a finished store for each scheme. Returns their URLs by scheme name."""
    urls = {}
    for name, scheme in SCHEMES.items():
        urls[name] = emptied(tiny_store, folder / f"{name}.zarr", scheme)
        found = dumper(urls[name], tiny)
        for shard in range(3):
            found.dump(shard, LAYERS)
    return urls
