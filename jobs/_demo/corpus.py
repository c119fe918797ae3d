"""The demo's text: functions of the running Python's own standard library, and a tokenizer trained on them.

The signature and the docstring are the prompt. The rest of the body is the response.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sysconfig
import tokenize
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from transformers import PreTrainedTokenizerFast

HELD_OUT_PERCENT = 6
LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
"""Names of skipped folders. Some distributions of Python lack `test`. It is skipped on all of them, so that the demo
reads similar texts everywhere."""
PROMPT_CHARS = 500
"""Maximum number of characters of a prompt."""
RESPONSE_CHARS = (60, 800)
"""Minimum and maximum number of characters of a response. Shorter bodies only call another function; the few longer
ones would make up half of the text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One function in two parts. `prompt + response` is its whole source, without the indentation of its class."""

    prompt: str
    response: str


def standard_library() -> Path:
    """Returns the folder of the standard library of the running Python."""
    return Path(sysconfig.get_path("stdlib"))


def read_pairs(root: Path) -> list[Pair]:
    """Reads the documented functions and methods of all modules below a folder.

    Returns:
        The functions, without repeated bodies, in a pseudorandom order that depends only on the files.
    """
    pairs: dict[str, Pair] = {}
    for path in sorted(root.rglob("*.py")):
        if LEFT_OUT.isdisjoint(path.relative_to(root).parts):
            for pair in _functions(path):
                pairs.setdefault("".join(pair.response.split()), pair)
    return sorted(pairs.values(), key=_digest)


def _functions(path: Path) -> Iterator[Pair]:
    try:
        with tokenize.open(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Newer parsers warn about escapes in old code.
            source = file.read()
            tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError):  # Some files are templates, or samples of invalid code.
        return
    lines = source.splitlines(keepends=True)
    for node in _definitions(tree):
        if ast.get_docstring(node, clean=False) is None or len(node.body) < 2:
            continue
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
        split, last = node.body[0].end_lineno, node.end_lineno
        if split is None or last is None or node.body[1].lineno <= split:
            continue
        indent = lines[first][: node.col_offset]
        if any(line.strip() and not line.startswith(indent) for line in lines[first:last]):
            continue  # A string or comment is less indented than the function.
        text = [line[len(indent) :] if line.strip() else "\n" for line in lines[first:last]]
        pair = Pair(prompt="".join(text[: split - first]), response="".join(text[split - first :]))
        if len(pair.prompt) <= PROMPT_CHARS and RESPONSE_CHARS[0] <= len(pair.response) <= RESPONSE_CHARS[1]:
            yield pair


def _definitions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yields functions that are not inside another function, so that no text occurs twice."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
        elif isinstance(child, ast.ClassDef | ast.If | ast.Try):
            yield from _definitions(child)


def is_held_out(pair: Pair) -> bool:
    """Returns whether a function is held out, which depends only on its text."""
    return int.from_bytes(_digest(pair)[-4:], "big") % 100 < HELD_OUT_PERCENT


def _digest(pair: Pair) -> bytes:
    return hashlib.sha256(f"{pair.prompt}{pair.response}".encode()).digest()


def write_jsonl(path: Path, pairs: Iterable[Pair]) -> None:
    """Writes one pair per line, in the format of `--data`."""
    path.write_text("".join(f"{json.dumps(asdict(pair))}\n" for pair in pairs), encoding="utf-8")


def train_tokenizer(pairs: list[Pair], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer that starts every text with <bos>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<bos>", "<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((pair.prompt + pair.response for pair in pairs), trainer)
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
