"""The stored objects of a shard, and the arrays that they decode to."""

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


class Part(NamedTuple):
    """A shard of a layer, or some of its arrays."""

    layer: str
    shard: int
    arrays: frozenset[str] | None = None
    """Names; None for all."""


def entries_per_row(spec: StoreSpec, layer: str) -> int:
    """Returns the room of a row in the arrays of a layer that are numbered per entry; 1 where there are none."""
    return spec.target.room if layer == "target" and spec.target else 1


def _chosen(layer: str, arrays: frozenset[str] | None) -> list[layout.ArraySpec]:
    """Returns the arrays of a layer that are asked for: all, where no names are given."""
    return [array for array in layout.layer_arrays(layer) if arrays is None or array.name in arrays]


def _have_objects(spec: StoreSpec, arrays: list[layout.ArraySpec]) -> list[layout.ArraySpec]:
    """Leaves out arrays that can have no objects: a bucket need not be asked for draws that no scheme made."""
    is_sampled = spec.target is not None and spec.target.scheme.name == "sample"
    return [array for array in arrays if array.name != "draws" or is_sampled]


def object_paths(spec: StoreSpec, part: Part) -> tuple[list[str], list[int]]:
    """Returns where the objects of a part of a store are, and how long each may be."""
    found = _have_objects(spec, _chosen(part.layer, part.arrays))
    sizes = {"shard_rows": spec.shard_rows, "k": entries_per_row(spec, part.layer)}
    return (
        [layout.object_path(part.layer, array, part.shard) for array in found],
        [zarr_objects.most_bytes(array, **sizes) for array in found],
    )


def check_commit_fits(spec: StoreSpec, commit: Commit) -> None:
    """Checks that a shard has room for what was committed.

    Raises:
        DamagedShardError: It has not.
    """
    for array in layout.layer_arrays(commit.layer):
        num = num_values(commit, array.per)
        if num > layout.capacity(array, spec.shard_rows, entries_per_row(spec, commit.layer)):
            raise DamagedShardError(
                commit.layer, commit.shard, f"a commit record of {num} values per {array.per}, more than there is room"
            )


def decode_layer(
    spec: StoreSpec, commit: Commit, data: list[bytes | None], arrays: frozenset[str] | None = None
) -> dict[str, NDArray[Any]]:
    """Turns the objects of a shard into its arrays, without padding, and checks them against its commit.

    Args:
        spec: Of the store.
        commit: The shard's record.
        data: Its objects in the order of `paths`, None for those that are not there.
        arrays: Which were read; all by default.

    Raises:
        DamagedShardError: What is stored is not what was committed.
    """
    check_commit_fits(spec, commit)
    layer, shard = commit.layer, commit.shard
    k, chosen = entries_per_row(spec, layer), _chosen(layer, arrays)
    objects_of = dict(zip((array.name for array in _have_objects(spec, chosen)), data, strict=True))
    values = {}
    for array in chosen:
        num, found = num_values(commit, array.per), objects_of.get(array.name)
        try:
            values[array.name] = zarr_objects.decode(found, num, array, shard_rows=spec.shard_rows, k=k)
        except ValueError as error:
            raise DamagedShardError(layer, shard, f"{array.name} that cannot be decoded ({error})") from error
        if (checksum := crc32c(values[array.name])) != commit.checksums[array.name]:
            absent = ", its object is not there," if found is None and array.name in objects_of else ""
            raise DamagedShardError(
                layer, shard, f"{array.name}{absent} with checksum {checksum}, not {commit.checksums[array.name]}"
            )
    return values
