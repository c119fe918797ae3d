"""Reads and writes the small JSON files of a store, strictly enough that two readers agree on what they say."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from logitstore.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Mapping


FROM_A_COPY = "restore it from a copy of the store"
MAX_JSON_DEPTH = 32
"""An array's metadata, the deepest, is nested 7 deep."""
MAX_JSON_BRACKETS = 2**16
"""A list takes 3 bytes of JSON and 60 of memory, and a while. An array's metadata, which has most of them, has 18."""


def to_json_bytes(value: Mapping[str, Any]) -> bytes:
    """Returns a JSON object as it is stored: indented, keys sorted, one newline at the end."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def parse_json(path: str, data: bytes, way_out: str = FROM_A_COPY) -> Any:  # noqa: ANN401
    """Parses what was read from a path, as strictly as two readers need to agree on what it says.

    Raises:
        FormatError: It is no JSON, names a field twice, holds NaN or an infinity, or is nested deeper than any of ours.
    """
    if data.count(b"[") + data.count(b"{") > MAX_JSON_BRACKETS:
        raise FormatError(f"{path} must hold a few lists and objects, got more than {MAX_JSON_BRACKETS} brackets")
    try:
        value = json.loads(data, object_pairs_hook=_unique, parse_constant=_refused)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} must be JSON, got {data[:40]!r} ({error!s:.80}); {way_out}") from error
    if _is_deeper(value, MAX_JSON_DEPTH):
        raise FormatError(f"{path} must be nested at most {MAX_JSON_DEPTH} deep, got more; this is no store")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a field is named twice")
    return fields


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def _is_deeper(value: object, depth: int) -> bool:
    """What is printed of a value is printed by recursion: it must not be deeper than Python can go."""
    level = [value]
    for _ in range(depth):
        parts = [part.values() if isinstance(part, dict) else part for part in level if isinstance(part, dict | list)]
        level = [part for some in parts for part in some if isinstance(part, dict | list)]
    return bool(level)
