"""`logitstore plan`: estimates a store before it is made: documents, rows, bytes by scheme, hours and price.

Needs neither a GPU nor the target's weights, except with --calibrate, which measures figures that are otherwise
assumed.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from logitstore.commands import shared_options as shared
from logitstore.commands.dump import choose_max_length, parse_references
from logitstore.commands.shared_options import Parser
from logitstore.commands.user_errors import command, leave, say, user_errors
from logitstore.dump.planning.report import render
from logitstore.format.schemes import OPTIONS, make_scheme

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from logitstore.format.schemes import Scheme


def parser() -> Parser:
    """Returns the parser of the command line."""
    p = Parser(prog="logitstore plan", description=__doc__)
    p.add_argument("--data", required=True, metavar="DATA", help=shared.DATA)
    shared.add_storage_options(p)
    shared.add_target(p, "Hugging Face id or folder of the target; only --calibrate needs its weights")
    p.add_argument("--tokenizer", metavar="MODEL", help="tokenizer of the documents. Default: the target's")
    shared.add_references(p, "plan losses/NAME too; may be repeated")
    p.add_argument(
        "--max_length", type=int, metavar="N", help="maximum number of tokens of a document. Default: as in the dump"
    )
    p.add_argument("--shard_rows", type=int, default=shared.SHARD_ROWS, metavar="N",
                   help="maximum number of rows of a shard. Default: %(default)s")  # fmt: skip
    p.add_argument("--scheme", choices=tuple(OPTIONS), help="plan this scheme alone, with its options below. Default: "
                   "all four with their defaults")  # fmt: skip
    shared.add_scheme_options(p)
    p.add_argument("--sample_documents", type=int, default=1000, metavar="N",
                   help="maximum number of records to tokenise; the others are estimated. "
                   "Default: %(default)s")  # fmt: skip
    p.add_argument("--calibrate", type=int, metavar="N",
                   help="run N of these records through the target on this machine, with each scheme, and measure "
                   "the figures that are otherwise assumed")  # fmt: skip
    shared.add_loading(p)
    shared.add_batch_tokens(p)
    p.add_argument("--rows_per_s", type=float, metavar="R",
                   help="rows that one actor computes per second: the rows/s that a dump printed, divided by "
                   "its --num_actors. Default: what --calibrate measures, else no hours are shown")  # fmt: skip
    p.add_argument(
        "--num_actors", type=int, default=1, metavar="N", help="number of actors of the dump. Default: %(default)s"
    )
    p.add_argument("--price_per_gb_month", type=float, default=0.023, metavar="P",
                   help="price of 10^9 bytes for a month. Default: %(default)s, a usual price in dollars")  # fmt: skip
    shared.add_json(p)
    return p


def run(argv: Sequence[str] | None = None) -> tuple[dict[str, Any], bool]:
    """Runs the plan; returns its figures, and whether to print them as JSON."""
    args = parser().parse_args(argv)
    schemes, references = _check(args), parse_references(args.reference)
    # This import loads torch and transformers, which takes seconds, so it comes after the arguments were checked.
    from logitstore.dump.planning import survey

    return survey.run(args, schemes, references, choose_max_length(args, None)), args.json


@command("plan writes nothing", extra="dump")
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    with user_errors():
        facts, as_json = run(argv)
    if as_json:
        print(json.dumps(facts, indent=1))
    else:
        say(render(facts))
    return 0


def _check(args: argparse.Namespace) -> list[Scheme]:
    """Checks the arguments as far as possible without opening anything; returns the schemes to plan.

    Raises:
        ValueError: A value is out of range, or an option belongs to another scheme.
    """
    for name in ("sample_documents", "calibrate", "num_actors", "batch_tokens", "shard_rows", "rows_per_s"):
        if (value := getattr(args, name)) is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name} must be above 0, got {name}={value}")
    if not 0 <= args.price_per_gb_month < float("inf"):
        raise ValueError(f"price_per_gb_month must be at least 0, got price_per_gb_month={args.price_per_gb_month}")
    if args.target is None and args.tokenizer is None:
        raise ValueError(
            "target or tokenizer must be given, got neither; add --target, or --tokenizer if there is no target yet"
        )
    if args.target is None and args.calibrate is not None:
        raise ValueError(f"calibrate needs --target, got calibrate={args.calibrate} without it; add --target")
    if args.calibrate is not None and args.rows_per_s is not None:
        raise ValueError(f"rows_per_s must be omitted with --calibrate, which measures the rate itself, got "
                         f"rows_per_s={args.rows_per_s}; omit one of the two")  # fmt: skip
    given = {name: getattr(args, name, None) for options in OPTIONS.values() for name in options}
    if args.scheme is not None:
        return [make_scheme(args.scheme, given)]
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"{name} needs --scheme, got {name}={value} without it; add the --scheme that has this option"
            )
    return [make_scheme(name, {}) for name in OPTIONS]


if __name__ == "__main__":
    leave(main())
