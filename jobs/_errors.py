"""What a person's mistake looks like: one line on stderr, exit status 2, no traceback."""

from __future__ import annotations

import errno
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from logitstore.errors import LogitStoreError, StorageError
from logitstore.storage.failures import is_refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@contextmanager
def user_errors() -> Iterator[None]:
    """Turns a bad argument or a store in a state that does not fit into one line and exit status 2.

    Only for the checks at the start of a job: what is raised later is not the user's mistake and keeps its traceback.
    """
    try:
        yield
    except (ValueError, LogitStoreError) as error:
        end(error, 2)


@contextmanager
def refusals(more: Callable[[], str] = str) -> Iterator[None]:
    """Turns a disk or a service that fails while something is written into one line and exit status 1.

    Args:
        more: Called then; returns the end of the line.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        if is_of_storage(error):
            end(f"{error}{more()}", 1)
        raise


def is_of_storage(error: Exception) -> bool:
    """Tells whether an error is of a disk or a service that fails or says no."""
    return isinstance(error, StorageError) or (isinstance(error, OSError) and is_refusal(error)) or _no_space(error)


def _no_space(error: BaseException | None) -> bool:
    """Tells whether an error, or one that it came from, is of a disk that takes no more."""
    if error is None:
        return False
    return (isinstance(error, OSError) and error.errno in NO_SPACE) or _no_space(error.__cause__ or error.__context__)


def end(error: Exception | str, status: int) -> NoReturn:
    """Ends the job with an error in one line."""
    print(f"error: {one_line(error)}", file=sys.stderr)
    raise SystemExit(status) from None


def one_line(error: Exception | str) -> str:
    """Returns what an error says, without breaks."""
    return " ".join(str(error).split())
