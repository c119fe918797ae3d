"""Computes loss masks. A loss mask marks the rows of a document whose predictions count."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray


def split_windows(
    ids: NDArray[np.int32], counted: NDArray[np.bool_], max_length: int
) -> Iterator[tuple[NDArray[np.int32], NDArray[np.uint8]]]:
    """Splits a document into windows, and computes the loss mask of each window.

    Row i of a window predicts token i + 1 of the window. The loss mask of row i is 1 if the prediction of this token
    counts. The loss mask of the last row is 0.

    Args:
        ids: [T]: token ids of the document.
        counted: [T]: whether the prediction of each token counts.
        max_length: Largest number of tokens in a window, at least 2.

    Yields:
        Token ids and loss mask of each window. Both have the same length. Both are empty if no prediction in the window
        counts.
    """
    mask = np.zeros(len(ids), dtype=np.uint8)
    mask[:-1] = counted[1:]
    # Windows overlap by one token: the token that follows a window is predicted by the first row of the next window.
    # A document of fewer than two tokens still gives one window, because the caller needs at least one.
    for start in range(0, max(len(ids) - 1, 1), max_length - 1):
        window = slice(start, start + max_length)
        row_mask = mask[window].copy()
        row_mask[-1:] = 0
        yield (ids[window], row_mask) if row_mask.any() else (ids[:0], row_mask[:0])
