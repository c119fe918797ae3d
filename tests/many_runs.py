"""Runs train_draft.main several times in this process: arguments are a JSON list of lists."""

import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "jobs"), str(Path(__file__).parents[1])]

import train_draft  # noqa: E402

if __name__ == "__main__":
    for argv in json.loads(sys.argv[1]):
        train_draft.main(argv)
