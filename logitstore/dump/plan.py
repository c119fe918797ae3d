"""The plan of a dump, its report, and the error that ends it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from logitstore.models.loading import ModelSource


@dataclass(frozen=True, kw_only=True)
class DumpPlan:
    """What is to be computed, with what."""

    target: ModelSource | None
    references: dict[str, ModelSource]
    made_by: dict[str, str]
    """The layers to be filled, target first, and the digests of the specs that they were added with."""
    retry_set_aside: bool = False
    """Whether documents that were set aside are tried again."""
    num_actors: int | None = None
    """None: as many as the GPUs of the cluster's nodes take, or one on a cluster without GPUs."""
    gpus_per_actor: float | None = None
    """Share of a GPU that each actor holds, rounded up so that a GPU is shared evenly. None: 1 where the cluster has
    GPUs, else 0."""
    cpus_per_actor: float | None = None
    """None: 1 beside a GPU, else as many as let all actors have a place on the cluster's nodes."""
    batch_tokens: int = 16384
    """Most tokens of a forward, padding included."""
    max_kl: float | None = None
    """Most nats that storing may lose of a row of the target, on average over those measured of a shard."""


@dataclass(kw_only=True)
class DumpReport:
    """How a dump went."""

    rows: int = 0
    """Rows written, prompt rows included."""
    entries: int = 0
    """Entries written."""
    seconds: float = 0.0
    """From the first shard handed out to the last one committed, loading of the models included."""
    shards_done: int = 0
    shards_skipped: int = 0
    """Shards that needed nothing, or that another job did meanwhile."""
    failed: dict[int, str] = field(default_factory=dict)
    """Why each shard that was set aside failed last."""
    num_documents: dict[str, int] = field(default_factory=dict)
    """How many documents are set aside in each of the plan's layers, whoever did it; layers without are not here."""
    documents: dict[str, dict[int, str]] = field(default_factory=dict)
    """Why, by layer and number in the store: of the first thousand of each layer."""
    stale: dict[str, list[int]] = field(default_factory=dict)
    """Shards, by layer, that were computed from other values than there are now; also of layers not in the plan."""
    missing: dict[str, list[int]] = field(default_factory=dict)
    """Shards, by layer of the plan, that are not there and did not fail: somebody took them back meanwhile."""


class DumpError(RuntimeError):
    """Nothing more can be computed: the dump stops at once. What is committed stays."""
