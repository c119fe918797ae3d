"""Command lines: what does not parse is a mistake like every other, and told in one line."""

from __future__ import annotations

import argparse
from typing import NoReturn


class RaisingErrors:
    """Makes any argparse parser report what it cannot parse like every other mistake, not by a page of usage."""

    def error(self, message: str) -> NoReturn:
        """Raises ValueError with what argparse found."""
        raise ValueError(f"arguments must parse, got: {message}; see --help")


class Parser(RaisingErrors, argparse.ArgumentParser):
    """An ArgumentParser, and those of its commands, that raises ValueError for what it cannot parse."""
