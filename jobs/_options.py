"""Which file system options go where."""

from __future__ import annotations

from typing import Any


def options_for(data: str, store: str | None, options: dict[str, Any] | None) -> dict[str, Any] | None:
    """Returns the options for reading `--data`: the store's, if both lie on the same kind of file system.

    Args:
        data: Path or URL of the data.
        store: URL of the store; None where there is none, and the options are meant for the data.
        options: What --storage_options holds.
    """
    protocol = data.partition("://")[0] if "://" in data else None
    if protocol is None or (store is not None and not store.startswith(f"{protocol}://")):
        return None
    return options
