"""The specs in the attributes of a store's groups."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from logitstore.errors import FormatError
from logitstore.spec import LossSpec, StoreSpec, TargetSpec, from_json
from logitstore.storage import FROM_A_COPY

if TYPE_CHECKING:
    from collections.abc import Mapping

    from logitstore.storage import Storage

WAY_OUT = f"{FROM_A_COPY}, or delete it and run the dump again with the same options, which writes it anew"

S = TypeVar("S", bound="StoreSpec | TargetSpec | LossSpec")


def read_attributes(storage: Storage, path: str) -> dict[str, Any] | None:
    """Reads the attributes of a group, None where there is no group.

    Raises:
        FormatError: There is one, but not of Zarr version 3.
    """
    name = f"{path}/zarr.json" if path else "zarr.json"
    try:
        metadata = storage.get_json(name, WAY_OUT)
    except FileNotFoundError:
        return None
    if not isinstance(metadata, dict) or metadata.get("node_type") != "group" or metadata.get("zarr_format") != 3:
        raise FormatError(f"{name} must describe a Zarr group, got {metadata!r:.80}; this is no store")
    attributes = metadata.get("attributes", {})
    if not isinstance(attributes, dict):
        raise FormatError(f"attributes must be a JSON object, got attributes={attributes!r:.80}; this is no store")
    return attributes


def stored_spec(cls: type[S], attributes: Mapping[str, Any], where: str) -> S:
    """Reads a spec from a group's attributes."""
    return from_json(cls, attributes.get("logitstore"), where)
