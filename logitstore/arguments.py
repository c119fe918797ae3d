"""Command lines: what does not parse is a mistake like every other, and told in one line."""

from __future__ import annotations

import argparse
import difflib
import re
from typing import NoReturn

CHOICES = re.compile(r"invalid choice: '(.*?)' \((choose from .*)\)", re.DOTALL)
"""What argparse says of a value that is none of some."""
MAX_CHOICES = 300
"""Characters of it that are read in a line."""


class RaisingErrors:
    """Makes any argparse parser report what it cannot parse like every other mistake, not by a page of usage."""

    def error(self, message: str) -> NoReturn:
        """Raises ValueError with what argparse found, and of many choices the nearest alone."""
        found = CHOICES.search(message)
        if found is not None and len(found[2]) > MAX_CHOICES:
            near = difflib.get_close_matches(found[1], re.findall(r"'([^']*)'", found[2]), 1)
            message = f"{message[: found.start(2)]}did you mean {near[0]}?)" if near else message[: found.start(2) - 2]
        raise ValueError(f"arguments must parse, got: {message}; see --help")


class Parser(RaisingErrors, argparse.ArgumentParser):
    """An ArgumentParser, and those of its commands, that raises ValueError for what it cannot parse."""
