"""Reads and writes the small JSON files of a store. Parsing is strict, so that all readers agree on the content."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from logitstore.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Mapping


FROM_A_COPY = "restore it from a copy of the store"
"""Next step that an error message suggests by default if a file is not JSON."""
MAX_JSON_DEPTH = 32
"""Maximum nesting depth of a JSON file. The deepest file of a store, an array's metadata, is nested 7 deep."""
MAX_JSON_BRACKETS = 2**16
"""Maximum number of lists and objects in a JSON file. An empty list takes 3 bytes of JSON but 60 bytes of memory, so
without this limit a hostile file could take too much memory and time. Among the files of a store, the metadata of an
array has the most lists and objects: 18."""


def to_json_bytes(value: Mapping[str, Any]) -> bytes:
    """Returns a JSON object in its stored form: indented, with sorted keys and one newline at the end."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def parse_json(path: str, data: bytes, way_out: str = FROM_A_COPY) -> Any:  # noqa: ANN401
    """Parses the content of a JSON file.

    Args:
        path: Path of the file, for error messages.
        data: Content of the file.
        way_out: Next step that the error message suggests if the content is not JSON.

    Raises:
        FormatError: The content is not JSON, repeats a field, contains NaN or an infinity, or exceeds `MAX_JSON_DEPTH`
            or `MAX_JSON_BRACKETS`.
    """
    # Brackets are counted before parsing, so that a hostile file is refused before it takes memory.
    if data.count(b"[") + data.count(b"{") > MAX_JSON_BRACKETS:
        raise FormatError(
            f"{path} must hold at most {MAX_JSON_BRACKETS} lists and objects, got more; this is not a file of a store"
        )
    try:
        value = json.loads(data, object_pairs_hook=_unique_fields, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # RecursionError: the JSON is nested too deep for the parser.
        raise FormatError(f"{path} must be JSON, got {data[:40]!r} ({error!s:.80}); {way_out}") from error
    if _is_deeper(value, MAX_JSON_DEPTH):
        raise FormatError(
            f"{path} must be nested at most {MAX_JSON_DEPTH} deep, got more; this is not a file of a store"
        )
    return value


def _unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    # Python keeps the last value of a repeated field; other parsers may keep the first.
    if len(fields) < len(pairs):
        raise ValueError("a field is named twice")
    return fields


def _refuse_constant(constant: str) -> None:
    # By default, Python's parser accepts NaN and Infinity, which are not JSON.
    raise ValueError(f"{constant} is not a JSON number")


def _is_deeper(value: object, depth: int) -> bool:
    """Returns whether a value is nested more than `depth` deep.

    Error messages show parts of the value with repr. Because repr is recursive, a deeply nested value could exceed
    Python's recursion limit there.
    """
    level = [value]
    for _ in range(depth):
        parts = [part.values() if isinstance(part, dict) else part for part in level if isinstance(part, dict | list)]
        level = [part for some in parts for part in some if isinstance(part, dict | list)]
    return bool(level)
