"""`logitstore fidelity`: shows how close a store is to its target, from figures that were measured during the dump."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from logitstore.commands.shared_options import Parser, add_json, add_storage_options
from logitstore.commands.user_errors import command, leave, say, user_errors
from logitstore.inspection import fidelity_report
from logitstore.storage.options import storage_options
from logitstore.storage.storage import Storage
from logitstore.store.reader import Store

if TYPE_CHECKING:
    from collections.abc import Sequence


def parser() -> Parser:
    """Returns the parser of the command line."""
    p = Parser(prog="logitstore fidelity", description=__doc__)
    p.add_argument("url", metavar="URL", help="folder or fsspec URL of the store")
    add_storage_options(p)
    p.add_argument("--sample", type=float, default=1.0, metavar="SHARE",
                   help="read only this share of each layer's shards, such as 0.01. Default: all")  # fmt: skip
    p.add_argument("--seed", type=int, default=0, help="seed that chooses the shards of a sample. Default: %(default)s")
    add_json(p)
    return p


@command("fidelity only reads")
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    with user_errors():
        args = parser().parse_args(argv)
        store = Store(Storage(args.url, storage_options(args.storage_options)))
        facts = fidelity_report.describe(store, sample=args.sample, seed=args.seed)
    if args.json:
        print(json.dumps(facts, indent=1))
    else:
        say(fidelity_report.render(facts))
    return 0


if __name__ == "__main__":
    leave(main())
