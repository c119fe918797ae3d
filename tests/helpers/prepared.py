"""Prepares documents into stores, for the tests of `prepare`."""

from __future__ import annotations

import functools
from pathlib import Path

from logitstore.documents.prepare import prepare
from logitstore.storage.storage import Storage
from tests.helpers.tiny import functions

CHAT = (
    "{% for m in messages %}<pad>{{ m.role }}{{ '\n' }}{{ m.content }}<eos>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<pad>assistant{{ '\n' }}{% endif %}"
)
TURNS = [
    {"role": "system", "content": "Answer in Python."},
    {"role": "user", "content": "a loop?"},
    {"role": "assistant", "content": "for x in y:\n    pass"},
    {"role": "user", "content": "and é?"},
    {"role": "assistant", "content": "print('é')\n"},
]


@functools.cache
def all_pairs():
    return functions(24)


def pairs(number):
    return all_pairs()[:number]


def run(data, tokenizer, url, **options):
    given = {"max_length": 64, "shard_rows": 128, "num_proc": 1, "progress": False} | options
    return prepare(Storage(url), str(data), tokenizer, **given)


def arrays_of(url):
    root = Path(url)
    files = [file for file in root.rglob("*") if file.is_file() and "commits" not in file.parts]
    return {str(file.relative_to(root)): file.read_bytes() for file in files}
