"""Paths in the checkout, and the environment for processes that tests start."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
JOBS = ROOT / "jobs"
HELPERS = ROOT / "tests" / "helpers"
DATA = ROOT / "tests" / "data"


def environment(**changes):
    """Returns this process's environment with PYTHONPATH set so that `tests.helpers` can be imported."""
    return os.environ | {"PYTHONPATH": str(ROOT)} | changes
