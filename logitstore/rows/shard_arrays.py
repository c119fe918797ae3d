"""Derives the paths of a shard's stored objects, and decodes the objects into checked arrays. Does no I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from logitstore.errors import DamagedShardError
from logitstore.format import layout, zarr_objects
from logitstore.format.commit import crc32c, num_values

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from logitstore.format.commit import Commit
    from logitstore.format.spec import StoreSpec


MAX_COMMIT_BYTES = 2**22
"""Maximum size of a commit record, in bytes."""


class Part(NamedTuple):
    """Some or all arrays of one shard of a layer."""

    layer: str
    """Name of the layer."""
    shard: int
    """Number of the shard."""
    arrays: frozenset[str] | None = None
    """Names of the arrays; None for all arrays of the layer."""


def entries_per_row(spec: StoreSpec, layer: str) -> int:
    """Returns the number of entries that a row of a layer has room for; 1 for layers other than `target`."""
    return spec.target.room if layer == "target" and spec.target else 1


def _chosen(layer: str, arrays: frozenset[str] | None) -> list[layout.ArraySpec]:
    """Returns the arrays of a layer that have the given names; all arrays for None."""
    return [array for array in layout.layer_arrays(layer) if arrays is None or array.name in arrays]


def _with_objects(spec: StoreSpec, arrays: list[layout.ArraySpec]) -> list[layout.ArraySpec]:
    """Returns the arrays that can have objects. Only stores of the scheme `sample` have objects for `draws`."""
    # With other schemes, all values of `draws` are the fill value 0, and Zarr stores no object for them.
    is_sampled = spec.target is not None and spec.target.scheme.name == "sample"
    return [array for array in arrays if array.name != "draws" or is_sampled]


def object_paths(spec: StoreSpec, part: Part) -> tuple[list[str], list[int]]:
    """Returns the paths and the maximum sizes of the objects of a part of a shard.

    Args:
        spec: Spec of the store, with the specs of its layers.
        part: The shard and its arrays.

    Returns:
        The paths of the objects relative to the store's root, and the maximum size of each object in bytes.
    """
    found = _with_objects(spec, _chosen(part.layer, part.arrays))
    sizes = {"shard_rows": spec.shard_rows, "k": entries_per_row(spec, part.layer)}
    return (
        [layout.object_path(part.layer, array, part.shard) for array in found],
        [zarr_objects.most_bytes(array, **sizes) for array in found],
    )


def check_commit_fits(spec: StoreSpec, commit: Commit) -> None:
    """Checks that a shard has room for the number of values that its commit record states.

    Raises:
        DamagedShardError: The record states more values of an array than a shard has room for.
    """
    for array in layout.layer_arrays(commit.layer):
        num = num_values(commit, array.per)
        if num > layout.capacity(array, spec.shard_rows, entries_per_row(spec, commit.layer)):
            raise DamagedShardError(
                commit.layer,
                commit.shard,
                f"a commit record with {num} values of {array.name}, more than a shard has room for",
            )


def decode_layer(
    spec: StoreSpec, commit: Commit, data: list[bytes | None], arrays: frozenset[str] | None = None
) -> dict[str, NDArray[Any]]:
    """Decodes the objects of a shard into arrays without padding, and checks the arrays against the commit record.

    Args:
        spec: Spec of the store, with the specs of its layers.
        commit: Commit record of the shard.
        data: Bytes of the objects in the order of the paths from `object_paths`; None for objects that do not exist.
        arrays: Names of the arrays that were read; None for all arrays of the layer.

    Returns:
        The arrays by name.

    Raises:
        DamagedShardError: An object cannot be decoded, or the values differ from the commit record.
    """
    # The record is checked before decoding, because decoding allocates as many values as the record states.
    check_commit_fits(spec, commit)
    layer, shard = commit.layer, commit.shard
    k, chosen = entries_per_row(spec, layer), _chosen(layer, arrays)
    objects_of = dict(zip((array.name for array in _with_objects(spec, chosen)), data, strict=True))
    values = {}
    for array in chosen:
        num, found = num_values(commit, array.per), objects_of.get(array.name)
        try:
            values[array.name] = zarr_objects.decode(found, num, array, shard_rows=spec.shard_rows, k=k)
        except ValueError as error:
            raise DamagedShardError(layer, shard, f"{array.name} that cannot be decoded ({error})") from error
        if (checksum := crc32c(values[array.name])) != commit.checksums[array.name]:
            # Zarr stores no object if all values are the fill value, so only the checksum shows that one is missing.
            absent = " (its object is missing)" if found is None and array.name in objects_of else ""
            raise DamagedShardError(
                layer, shard, f"{array.name}{absent} with checksum {checksum}, not {commit.checksums[array.name]}"
            )
    return values
