"""The `logitstore` command: finds and runs the requested command.

Commands are entry points of the group `logitstore.commands`, so that this package never imports the trainer. A command
is imported only when it runs: `logitstore --help` does not import torch.
"""

from __future__ import annotations

import sys
from importlib.metadata import entry_points, version
from typing import TYPE_CHECKING, NoReturn

from logitstore.commands.user_errors import command, end, end_without_package, leave
from logitstore.errors import nearest

if TYPE_CHECKING:
    from collections.abc import Sequence

GROUP = "logitstore.commands"
COMMANDS = {
    "plan": "estimate a store before it is made: documents, bytes, hours, price",
    "dump": "run a target over documents and write its distributions into a store",
    "info": "show the contents, the progress and the size of a store",
    "fidelity": "show how close a store is to its target",
    "verify": "read every committed byte; --repair takes back damaged shards",
    "train": "train a draft from a store",
    "evaluate": "measure how many of a draft's tokens the target accepts",
    "export": "write a shard as NumPy arrays to an .npz file",
}
"""The commands of this distribution, in the order in which they are used, and a line of help for each."""
EXTRAS = {"train": "train", "evaluate": "train"}
"""For each command that cannot be imported without an extra (pip install 'logitstore[extra]'): name of the extra."""


def help_text(names: Sequence[str]) -> str:
    """Returns the help text of `logitstore`, with a line for each command in `names`."""
    # Another package may add commands as entry points. Their help is left out, because it could be read only by
    # importing them.
    others = dict.fromkeys(sorted(set(names) - set(COMMANDS)), "")
    lines = [f"  {name:<10}{text}" for name, text in {**COMMANDS, **others}.items() if name in names]
    return "\n".join(
        [
            "usage: logitstore COMMAND [...]",
            "",
            "An offline cache of a target's next-token distributions, and a trainer of drafts that reads it.",
            "",
            *lines,
            "",
            "`logitstore COMMAND --help` shows the flags of a command, `logitstore --version` the version.",
        ]
    )


@command("nothing was started")
def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    found = {entry.name: entry for entry in entry_points(group=GROUP)}
    name = arguments[0] if arguments else "none"
    if name in ("-h", "--help", "help"):
        print(help_text(list(found)))
        return 0
    if name == "--version":
        print(version("logitstore"))
        return 0
    if name not in found:
        end(f"command must be one of {', '.join(found)}, got {name}{nearest(name, found)}; see logitstore --help", 2)
    try:
        run = found[name].load()
    except ModuleNotFoundError as error:
        end_without_package(error, EXTRAS.get(name, ""))
    return int(run(arguments[1:]))


def console() -> NoReturn:
    """Entry point of the installed `logitstore`: runs a command and ends the process."""
    leave(main())


if __name__ == "__main__":
    console()
