"""Whether stores can be trained on, alone and together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from logitstore.errors import IdentityError, LayerNotFoundError
from logitstore.storage.options import without_credentials
from logitstore.store.commits.set_aside import explain_missing

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from logitstore import Store
    from logitstore.format.spec import ModelSpec


def check_losses_given(column: str, losses: Mapping[str, str]) -> str:
    """Returns the name of the losses that a column is.

    Raises:
        ValueError: None is given.
    """
    if column not in losses:
        raise ValueError(
            f"losses must name the stores' losses that {column} is, got losses={dict(losses)}; add it, such as "
            f"{{{column!r}: 'reference'}}"
        )
    return losses[column]


def check_complete(store: Store, layer: str) -> None:
    """Checks that a layer is there with every shard: training on part of a store would go unnoticed.

    Raises:
        LayerNotFoundError: It is not.
        IdentityError: Some shards were computed from other tokens or target rows than the store holds now: reading
            them would fail, hours later perhaps.
    """
    if layer not in store.layers:
        raise LayerNotFoundError(
            f"store must have a layer {layer!r}, got layers={list(store.layers)} in {store.url}; "
            "dump it first with jobs/dump_logits.py"
        )
    if missing := store.layers[layer].gaps:
        total = store.spec.num_shards
        there = total - store.layers[layer].num_missing
        raise LayerNotFoundError(
            f"layer {layer!r} must have all of its {total} shards, got {there} in {store.url} (shard "
            f"{missing[0].start} is the first missing); run the dump again to finish it"
            f"{explain_missing(store.storage, layer)}"
        )
    if stale := store.layers[layer].stale:
        raise IdentityError(
            f"layer {layer!r} must be computed from what the store holds now, got {len(stale)} stale shards in "
            f"{store.url} (shard {min(stale)} is the first); run the dump again, which replaces them"
        )


def check_alike(stores: Sequence[Store], *, reads_target: bool, losses: Iterable[str] = ()) -> None:
    """Checks that documents of all stores can be rows of one batch.

    Raises:
        ValueError: There is no store; or they differ in their tokenizer, in the model of losses that are read, or, if
            the target is read, in it or in whether entries were drawn. Names both stores.
    """
    if not stores:
        raise ValueError("stores must be at least one, got none; add --store")
    first = stores[0]
    losses = tuple(losses)
    for store in stores[1:]:
        ours, theirs = (_traits(each, reads_target=reads_target, losses=losses) for each in (first, store))
        for (name, one), other in zip(ours.items(), theirs.values(), strict=True):
            if one[0] != other[0]:
                raise ValueError(
                    f"stores must be of one {name} to be trained on together, got {name}={one[1]} in {first.url} and "
                    f"{name}={other[1]} in {store.url}; leave one out"
                )


def _traits(store: Store, *, reads_target: bool, losses: Iterable[str]) -> dict[str, tuple[object, str]]:
    """Returns what stores that go together share, and how to call it."""
    made, target = store.spec.tokenizer, store.spec.target
    traits: dict[str, tuple[object, str]] = {"tokenizer": (made.fingerprint, f"{made.name} ({made.fingerprint[:19]})")}
    if reads_target and target is not None:
        traits["kind of entries"] = (target.scheme.draws, "drawn" if target.scheme.draws else "truncated")
        traits["target"] = ((target.model.name, target.model.revision), _called(target.model))
    # gaps to different models do not compare
    for name in losses:
        model = store.spec.losses[name].model
        traits[f"model of losses {name}"] = (model.revision, _called(model))
    return traits


def _called(model: ModelSpec) -> str:
    return f"{without_credentials(model.name)} at {model.revision}"
