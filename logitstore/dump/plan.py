"""Classes for the plan of a dump, its report, and the error that ends a dump."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from logitstore.models.loading import ModelSource


@dataclass(frozen=True, kw_only=True)
class DumpPlan:
    """The layers to fill, the models that compute them, and the resources to use."""

    target: ModelSource | None
    """The target model; None if the layer `target` is not filled."""
    references: dict[str, ModelSource]
    """Reference models by name. Each of them fills the layer `losses/<name>`."""
    made_by: dict[str, str]
    """The keys are the layers to fill, with `target` first. The value is the digest that the layer's spec had when the
    layer was added."""
    retry_set_aside: bool = False
    """Whether to retry documents that were set aside."""
    num_actors: int | None = None
    """Number of actors. None: as many as fit on the GPUs of the cluster's nodes, or one if actors use no GPUs."""
    gpus_per_actor: float | None = None
    """GPUs of each actor. A fraction is rounded up to 1, 1/2, 1/3, ... None: 1 if the cluster has GPUs, else 0."""
    cpus_per_actor: float | None = None
    """CPUs of each actor. None: 1 if the actor has a GPU, else the largest number with which all actors fit."""
    batch_tokens: int = 16384
    """Largest number of tokens in a forward pass, including padding."""
    max_kl: float | None = None
    """Largest loss, in nats per row, that storing the target's rows may cause. The dump stops if the mean loss of the
    rows that are measured in a shard is larger than `max_kl`. None for no limit."""


@dataclass(kw_only=True)
class DumpReport:
    """Result of a dump."""

    rows: int = 0
    """Number of rows in the shards written, including masked rows."""
    entries: int = 0
    """Number of entries written."""
    seconds: float = 0.0
    """Seconds from the start of the actors to the last commit, including the loading of the models."""
    shards_done: int = 0
    """Number of shards written."""
    shards_skipped: int = 0
    """Number of shards that were complete at the start, or that another job completed in the meantime."""
    failed: dict[int, str] = field(default_factory=dict)
    """Last error of each shard that was set aside, by number of the shard."""
    counted: dict[str, int] = field(default_factory=dict)
    """Number of committed rows that count (loss mask 1, document not set aside), by layer of the plan."""
    num_documents: dict[str, int] = field(default_factory=dict)
    """For each layer of the plan, the number of documents that are set aside after the dump. Includes documents that
    earlier jobs set aside. Layers without documents that are set aside are left out."""
    documents: dict[str, dict[int, str]] = field(default_factory=dict)
    """Reasons why documents are set aside, by layer and by number of the document in the store. Holds at most a
    thousand documents of each layer."""
    stale: dict[str, list[int]] = field(default_factory=dict)
    """Stale shards by layer. A stale shard was computed from values that the store no longer holds. Layers outside the
    plan are included."""
    missing: dict[str, list[int]] = field(default_factory=dict)
    """For each layer of the plan, the shards that did not fail but are not committed after the dump. Another job or a
    repair took these shards back."""


class DumpError(RuntimeError):
    """The dump cannot continue and stops at once. Committed shards stay."""
