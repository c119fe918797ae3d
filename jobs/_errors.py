"""What a person's mistake looks like: one line on stderr, exit status 2, no traceback."""

from __future__ import annotations

import errno
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from logitstore.drivers import is_refusal
from logitstore.errors import LogitStoreError, StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator

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
def refusals() -> Iterator[None]:
    """Turns a disk or a service that fails while something is written into one line and exit status 1."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, StorageError) or (isinstance(error, OSError) and is_refusal(error)) or _no_space(error):
            end(error, 1)
        raise


def _no_space(error: BaseException | None) -> bool:
    """Tells whether an error, or one that it came from, is of a disk that takes no more."""
    if error is None:
        return False
    return (isinstance(error, OSError) and error.errno in NO_SPACE) or _no_space(error.__cause__ or error.__context__)


def end(error: Exception, status: int) -> NoReturn:
    """Ends the job with an error in one line."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    raise SystemExit(status) from None
