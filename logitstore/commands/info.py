"""`logitstore info`: shows the contents, the progress and the size of a store."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from logitstore.commands.shared_options import Parser, add_json, add_storage_options
from logitstore.commands.user_errors import command, leave, say, user_errors
from logitstore.inspection import info
from logitstore.storage.options import storage_options
from logitstore.storage.storage import Storage
from logitstore.store.reader import Store

if TYPE_CHECKING:
    from collections.abc import Sequence


def parser() -> Parser:
    """Returns the parser of the command line."""
    p = Parser(prog="logitstore info", description=__doc__)
    p.add_argument("url", metavar="URL", help="folder or fsspec URL of the store")
    add_storage_options(p)
    add_json(p)
    return p


@command("info only reads")
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    with user_errors():
        args = parser().parse_args(argv)
        facts = info.describe(Store(Storage(args.url, storage_options(args.storage_options))))
    if args.json:
        print(json.dumps(facts, indent=1))
    else:
        say(info.render(facts))
    return 0


if __name__ == "__main__":
    leave(main())
