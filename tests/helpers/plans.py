"""Runs `logitstore plan` in this process."""

from __future__ import annotations

import json

from logitstore.commands import main as cli

SHARD_ROWS, MAX_LENGTH = 2048, 256


def planned(capsys, *options):
    """Returns the JSON that the command prints."""
    assert cli.main(["plan", "--json", *map(str, options)]) == 0
    return json.loads(capsys.readouterr().out)


def options_of(tiny, *more):
    return ["--data", tiny.data, "--target", tiny.target, "--max_length", MAX_LENGTH, "--shard_rows", SHARD_ROWS, *more]


def shown(capsys, *options):
    """Returns the lines that the command prints."""
    assert cli.main(["plan", *map(str, options)]) == 0
    return capsys.readouterr().out.splitlines()


def refused(capsys, *options):
    """Returns the single line with which the command refuses its options."""
    assert cli.main(["plan", *map(str, options)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line
