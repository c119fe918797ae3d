"""The parser of all commands, and the flags that several commands have, with their help texts and defaults.

A flag has the same meaning in every command. Imports nothing slow, because `--help` must be quick in every command.
"""

from __future__ import annotations

import argparse
import re
import sys
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Protocol

from logitstore.errors import nearest
from logitstore.format.schemes import OPTIONS

if TYPE_CHECKING:
    from logitstore.models.loading import ModelSource


DTYPES = ("auto", "float32", "bfloat16", "float16")
BATCH_TOKENS = 16384
MAX_LENGTH = 2048
SHARD_ROWS = 2**18
DATA = (
    "JSONL, Parquet or text: a path, folder, glob or fsspec URL; or hf:NAME[:SPLIT] for a data set of the hub. "
    "Columns: messages; prompt and response; text; or input_ids, with a loss_mask if there is one"
)
BOOLEANS = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}
CHOICES = re.compile(r"invalid choice: '(.*?)' \((choose from .*)\)", re.DOTALL)
"""Matches argparse's message about a value that is not one of the choices."""
UNKNOWN = re.compile(r"unrecognized arguments: (.*)", re.DOTALL)
"""Matches argparse's message about flags that it does not know."""
MAX_CHOICES = 300
"""Maximum length, in characters, of a list of choices in a message. Longer lists are left out of the message."""


class RaisingErrors:
    """Base class for argparse parsers that raise ValueError.

    The error message is one line. For an unknown flag or choice, it suggests the known one that is spelt most like it.
    """

    def flags(self) -> list[str]:
        """Returns the names of all flags, in the order of the help."""
        return re.findall(r"--\w[\w-]*", self.format_help())  # type: ignore[attr-defined]

    def error(self, message: str) -> NoReturn:
        """Raises ValueError with argparse's message, and suggests the flag or choice with the most similar spelling."""
        if (unknown := UNKNOWN.search(message)) is not None:
            message += nearest(unknown[1].split()[0], self.flags())
        elif (found := CHOICES.search(message)) is not None:
            near = nearest(found[1], re.findall(r"'([^']*)'", found[2]))
            if len(found[2]) > MAX_CHOICES:
                message = message[: found.start(2) - 2]
            message += near
        raise ValueError(f"{message}; see --help")


class Parser(RaisingErrors, argparse.ArgumentParser):
    """An ArgumentParser that raises ValueError for arguments that do not parse, and accepts no abbreviated flags."""

    switches: ClassVar[set[str]] = set()
    """Flags whose value is optional: `--flag` and `--flag true` turn them on, `--flag false` turns them off."""

    def __init__(self, **options: Any) -> None:  # noqa: ANN401
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # noqa: ANN401 - as in argparse
        """Parses arguments. A switch takes the next word as its value only if that word is a boolean."""
        # argparse alone would take any next word as the value, such as the URL in `--repair URL`.
        words = list(sys.argv[1:] if args is None else args)
        joined: list[str] = []
        while words:
            word = words.pop(0)
            if word in self.switches:
                has_value = bool(words) and words[0].lower() in BOOLEANS
                word = f"{word}={words.pop(0) if has_value else 'true'}"
            joined.append(word)
        # If a required flag is misspelt, argparse would report only that the flag is missing, not the misspelt word.
        unknown = [word for word in joined if word[:2] == "--" != word and word.partition("=")[0] not in self.flags()]
        if unknown:
            self.error(f"unrecognized arguments: {unknown[0]}")
        return super().parse_known_args(joined, namespace)


class Container(Protocol):
    """A parser or a group of its flags. argparse has no public class for both."""

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:  # noqa: ANN401
        """Adds a flag."""


def boolean(text: str) -> bool:
    """Parses a boolean: true, yes or 1, or false, no or 0.

    Raises:
        ArgumentTypeError: The text is not a boolean.
    """
    if text.lower() not in BOOLEANS:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return BOOLEANS[text.lower()]


def add_switch(parser: Container, flag: str, text: str) -> None:
    """Adds a flag that is off by default. `--flag` and `--flag true` turn it on."""
    Parser.switches.add(flag)
    parser.add_argument(flag, nargs="?", const=True, default=False, type=boolean, metavar="BOOL", help=text)


def add_store(parser: Container, *, required: bool, text: str) -> None:
    """Adds `--store`."""
    parser.add_argument("--store", required=required, metavar="URL", help=text)


def add_storage_options(parser: Container) -> None:
    """Adds `--storage_options`."""
    parser.add_argument(
        "--storage_options",
        metavar="FILE",
        help="JSON file of fsspec options (such as credentials) for the store's URL, and for data on the same kind of "
        "file system",
    )


def add_target(parser: Container, text: str) -> None:
    """Adds `--target` and `--target_revision`."""
    parser.add_argument("--target", metavar="MODEL", help=text)
    parser.add_argument("--target_revision", metavar="REV", help="branch, tag or commit of the target on the hub")


def add_references(parser: Container, text: str) -> None:
    """Adds `--reference NAME=MODEL`, which may be given several times."""
    parser.add_argument("--reference", action="append", default=[], metavar="NAME=MODEL", help=text)


def add_loading(parser: Container) -> None:
    """Adds the flags for loading models: data type, attention implementation, remote code."""
    parser.add_argument(
        "--dtype", default="auto", choices=DTYPES, help="data type of all models' weights; auto: as in each checkpoint"
    )
    parser.add_argument(
        "--attn_implementation",
        metavar="NAME",
        help="attention of transformers: sdpa, eager, flash_attention_2, ...; default: transformers' choice",
    )
    add_switch(parser, "--trust_remote_code", "run code that comes with the models")


def add_batch_tokens(parser: Container) -> None:
    """Adds `--batch_tokens`."""
    parser.add_argument(
        "--batch_tokens",
        type=int,
        default=BATCH_TOKENS,
        metavar="N",
        help="maximum number of tokens of a forward pass, with padding. Fewer take less memory. Default: %(default)s",
    )


def add_scheme_options(parser: Container) -> None:
    """Adds the options of all schemes; their defaults are in `logitstore.format.schemes.OPTIONS`."""
    nucleus, hybrid = OPTIONS["nucleus"], OPTIONS["hybrid"]
    parser.add_argument(
        "--k",
        type=int,
        metavar="N",
        help="topk, nucleus: maximum number of entries of a row. More is more faithful and larger. "
        f"Default: {OPTIONS['topk']['k']}",
    )
    parser.add_argument(
        "--mass",
        type=float,
        metavar="P",
        help=f"nucleus: total probability that the entries of a row reach. Default: {nucleus['mass']}",
    )
    parser.add_argument(
        "--k_min",
        type=int,
        metavar="N",
        help=f"nucleus: minimum number of entries of a row. Default: {nucleus['k_min']}",
    )
    parser.add_argument(
        "--num_draws",
        type=int,
        metavar="N",
        help="sample: number of draws for each row; hybrid: each draw stands for a probability of 1/N. "
        f"Default: {hybrid['num_draws']}",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="sample, hybrid: seed of the draws. Default: 0")


def add_no_progress(parser: Container) -> None:
    """Adds `--no_progress`."""
    add_switch(parser, "--no_progress", "show no progress bars")


def add_json(parser: Container) -> None:
    """Adds `--json`."""
    add_switch(parser, "--json", "print the figures as JSON instead of text")


def source_of(args: argparse.Namespace, name: str, revision: str | None = None) -> ModelSource:
    """Returns the source of a model, with the loading options from `args` (see `add_loading`)."""
    # Imported here, because the module imports transformers, which is slow.
    from logitstore.models.loading import ModelSource

    return ModelSource(
        name=name,
        revision=revision,
        dtype=args.dtype,
        attn_implementation=args.attn_implementation,
        trust_remote_code=args.trust_remote_code,
    )
