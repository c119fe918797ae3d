"""The flags of `logitstore plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from logitstore.format.schemes import OPTIONS

if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `logitstore plan`; what they share with the dump is called as there."""
    parser.add_argument("--data", required=True, metavar="DATA", help="as for jobs/dump_logits.py")
    parser.add_argument("--storage_options", metavar="FILE", help="JSON file of fsspec options for the data")
    parser.add_argument("--target", metavar="MODEL", help="Hugging Face id or folder; only --calibrate needs its "
                        "weights")  # fmt: skip
    parser.add_argument("--revision", help="the target's branch, tag or commit")
    parser.add_argument("--tokenizer", metavar="MODEL", help="default: the target's")
    parser.add_argument("--reference", action="append", default=[], metavar="NAME=MODEL", help="plan losses/NAME too; "
                        "repeatable")  # fmt: skip
    parser.add_argument("--max_length", type=int, help="tokens of a document (default: as in the dump)")
    parser.add_argument("--shard_rows", type=int, default=2**18, help="most rows of a shard (default %(default)s)")
    parser.add_argument("--scheme", choices=tuple(OPTIONS), help="this one alone, with its options below; default: all "
                        "four with theirs")  # fmt: skip
    for name in dict.fromkeys(name for options in OPTIONS.values() for name in options):
        parser.add_argument(f"--{name}", type=float if name == "mass" else int, help="as in the dump")
    parser.add_argument("--sample_documents", type=int, default=1000, metavar="N",
                        help="records that are tokenised; the rest is estimated (default %(default)s)")  # fmt: skip
    parser.add_argument("--calibrate", type=int, metavar="N",
                        help="run N of these records through the target on this machine, with each scheme, and "
                        "measure what is assumed otherwise")  # fmt: skip
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"),
                        help="of the weights that --calibrate loads")  # fmt: skip
    parser.add_argument("--attn_implementation", help="of transformers: sdpa, eager, flash_attention_2, ...")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code from the models' repositories")
    parser.add_argument("--batch_tokens", type=int, default=16384, help="of --calibrate (default %(default)s)")
    parser.add_argument("--rows_per_s", type=float, metavar="R",
                        help="rows that one actor computes in a second: rows_per_second as a dump printed it, over the "
                        "--num_actors of that dump; no hours without, or those that --calibrate measures")  # fmt: skip
    parser.add_argument("--num_actors", type=int, default=1, help="actors of the dump (default %(default)s)")
    parser.add_argument("--price_per_gb_month", type=float, default=0.023, metavar="P",
                        help="of 10^9 bytes (default %(default)s, a usual price in dollars)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
