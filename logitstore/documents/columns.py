"""Chooses the columns of a data set from which documents are made."""

from __future__ import annotations

from typing import Literal

Kind = Literal["text", "prompt_response", "messages", "input_ids"]
"""Kind of a record. The columns of a record determine its kind."""
COLUMNS: dict[Kind, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt_response": ("prompt", "response"),
    "text": ("text",),
    "input_ids": ("input_ids",),
}
"""Columns that each kind of record needs. If a data set has the columns of several kinds, the kind that comes
first here is used."""


def choose_columns(names: list[str]) -> list[str]:
    """Selects the columns from which documents are made.

    Args:
        names: Names of all columns of the data set.

    Returns:
        The columns of the first kind in `COLUMNS` whose columns are all in the data set. For `input_ids`, also the
        column `loss_mask` if the data set has it.

    Raises:
        ValueError: For each kind in `COLUMNS`, the data set lacks at least one column.
    """
    for columns in COLUMNS.values():
        if all(name in names for name in columns):
            extra = ["loss_mask"] if columns == ("input_ids",) and "loss_mask" in names else []
            return [*columns, *extra]
    raise ValueError(
        "columns must include messages, or prompt and response, or text, or input_ids (with loss_mask or without), "
        f"got columns={', '.join(names) or 'none'}; rename the columns that hold the documents"
    )
