"""What a person's mistake looks like: one line on stderr, exit status 2, no traceback."""

from __future__ import annotations

import argparse
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from logitstore.errors import LogitStoreError

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def user_errors() -> Iterator[None]:
    """Turns a bad argument or a store in a state that does not fit into one line and exit status 2.

    Only for the checks at the start of a job: what is raised later is not the user's mistake and keeps its traceback.
    """
    try:
        yield
    except (ValueError, LogitStoreError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


class RaisingErrors:
    """Makes any argparse parser report what it cannot parse like every other mistake, not by a page of usage."""

    def error(self, message: str) -> NoReturn:
        """Raises ValueError with what argparse found."""
        raise ValueError(f"arguments must parse, got: {message}; see --help")


class Parser(RaisingErrors, argparse.ArgumentParser):
    """An ArgumentParser for use within `user_errors`."""
