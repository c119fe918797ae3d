"""Runs `logitstore plan` in this process, for the tests of it."""

from __future__ import annotations

import json

from logitstore import cli

SHARD_ROWS, MAX_LENGTH = 2048, 256


def planned(capsys, *options):
    """The JSON that the command prints."""
    assert cli.main(["plan", "--json", *map(str, options)]) == 0
    return json.loads(capsys.readouterr().out)


def options_of(tiny, *more):
    return ["--data", tiny.data, "--target", tiny.target, "--max_length", MAX_LENGTH, "--shard_rows", SHARD_ROWS, *more]


def shown(capsys, *options):
    """The lines that the command prints."""
    assert cli.main(["plan", *map(str, options)]) == 0
    return capsys.readouterr().out.splitlines()


def refused(capsys, *options):
    """The one line that the command ends with."""
    assert cli.main(["plan", *map(str, options)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line
