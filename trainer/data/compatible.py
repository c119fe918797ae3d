"""Checks that stores can be trained on: each store alone, and several stores together."""

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
    """Returns the name of the stored losses that a column is read from.

    Args:
        column: Name of a column that holds losses: `reference_ce` or `initial_ce`.
        losses: Names of stored losses, keyed by the column that is read from them.

    Raises:
        ValueError: `losses` does not contain the column.
    """
    if column not in losses:
        raise ValueError(
            f"losses must contain {column}, got losses={dict(losses)}; add the name of the stored losses, for "
            f"example {{{column!r}: 'reference'}}"
        )
    return losses[column]


def check_complete(store: Store, layer: str) -> None:
    """Checks that every shard of a layer is committed and up to date.

    Without this check, a draft could be trained on a part of the store, and no warning would be printed.

    Args:
        store: The open store.
        layer: Name of the layer.

    Raises:
        LayerNotFoundError: The store does not have the layer, or some shards of the layer are not committed.
        IdentityError: Some shards of the layer are stale: the tokens or target rows that they were computed from have
            been replaced since. Without this check, reading a stale shard would fail, perhaps after hours of training.
    """
    if layer not in store.layers:
        raise LayerNotFoundError(
            f"store must have a layer {layer!r}, got layers={list(store.layers)} in {store.url}; "
            "dump it first with `logitstore dump`"
        )
    if missing := store.layers[layer].gaps:
        total = store.spec.num_shards
        committed = total - store.layers[layer].num_missing
        raise LayerNotFoundError(
            f"layer {layer!r} must have all of its {total} shards, got {committed} in {store.url} (the "
            f"first missing shard is {missing[0].start}); run the dump again to finish it"
            f"{explain_missing(store.storage, layer)}"
        )
    if stale := store.layers[layer].stale:
        raise IdentityError(
            f"layer {layer!r} must be computed from the store's current tokens and target rows, got {len(stale)} stale "
            f"shards in {store.url} (shard {min(stale)} is the first); run the dump again, which replaces them"
        )


def check_alike(stores: Sequence[Store], *, reads_target: bool, losses: Iterable[str] = ()) -> None:
    """Checks that documents of all the stores may be put into the same batch.

    Args:
        stores: The open stores.
        reads_target: Whether the target's rows are read.
        losses: Names of the losses that are read from every store.

    Raises:
        ValueError: No store is given, or two stores differ in the tokenizer or in the model that computed the losses.
            Also raised if the target is read, and two stores differ in the target model or in the kind of entries
            (drawn or truncated). If two stores differ, the message names both of them.
    """
    if not stores:
        raise ValueError("at least one store must be given, got none; add --store")
    first = stores[0]
    losses = tuple(losses)
    for store in stores[1:]:
        ours, theirs = (_traits(each, reads_target=reads_target, losses=losses) for each in (first, store))
        for (name, one), other in zip(ours.items(), theirs.values(), strict=True):
            if one[0] != other[0]:
                raise ValueError(
                    f"stores must have the same {name} to be trained on together, got {name}={one[1]} in {first.url} "
                    f"and {name}={other[1]} in {store.url}; omit one of them"
                )


def _traits(store: Store, *, reads_target: bool, losses: Iterable[str]) -> dict[str, tuple[object, str]]:
    """Returns the properties that all stores must share, keyed by name.

    Each property is a pair of the value to compare and the text that stands for this value in a message.
    """
    made, target = store.spec.tokenizer, store.spec.target
    traits: dict[str, tuple[object, str]] = {"tokenizer": (made.fingerprint, f"{made.name} ({made.fingerprint[:19]})")}
    if reads_target and target is not None:
        traits["kind of entries"] = (target.scheme.draws, "drawn" if target.scheme.draws else "truncated")
        traits["target"] = ((target.model.name, target.model.revision), _model_text(target.model))
    # Loss gaps that were computed with different models cannot be compared with each other.
    for name in losses:
        model = store.spec.losses[name].model
        traits[f"model of losses {name}"] = (model.revision, _model_text(model))
    return traits


def _model_text(model: ModelSpec) -> str:
    """Returns the name and the revision of a model for a message, without the credentials that a URL may contain."""
    return f"{without_credentials(model.name)} at {model.revision}"
