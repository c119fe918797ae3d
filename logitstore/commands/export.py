"""`logitstore export`: writes a shard as padded NumPy arrays to an .npz file, for tools that cannot read a store."""

from __future__ import annotations

from typing import TYPE_CHECKING

from logitstore.commands.shared_options import Parser, add_storage_options, add_switch
from logitstore.commands.user_errors import command, leave, say, user_errors
from logitstore.inspection import export
from logitstore.storage.options import storage_options
from logitstore.storage.storage import Storage
from logitstore.store.reader import Store

if TYPE_CHECKING:
    from collections.abc import Sequence


def parser() -> Parser:
    """Returns the parser of the command line."""
    p = Parser(prog="logitstore export", description=__doc__)
    p.add_argument("url", metavar="URL", help="folder or fsspec URL of the store")
    add_storage_options(p)
    p.add_argument("--shard", type=int, required=True, metavar="N", help="number of the shard, from 0")
    p.add_argument("--out", required=True, metavar="FILE.npz", help="path of the file to write")
    add_switch(p, "--overwrite", "replace the file if it exists")
    return p


@command("the file is written whole or not at all; run the same command again")
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    with user_errors():
        args = parser().parse_args(argv)
        store = Store(Storage(args.url, storage_options(args.storage_options)))
        say(export.write(store, args.shard, args.out, overwrite=args.overwrite))
    return 0


if __name__ == "__main__":
    leave(main())
