"""A target of another kind: interpolated n-grams of all installed text, with entropies as low as those of large models.

A Llama trained here for minutes is uncertain about most tokens. N-gram counts of a hundred MB of text need no training.
Witten-Bell interpolation of contexts of one to five tokens with the frequencies of the whole vocabulary gives a proper
distribution with the tail of real text, in a second. The draft uses only shorter contexts and is flatter.

N rows, V vocabulary.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from transformers import AutoTokenizer

from benchmarks import _distributions
from benchmarks._distributions import RECIPES, TEXT_ROOTS, Chunk, encode, functions, texts

TOKENIZER_OF = "large"
LONGEST, LONGEST_OF_DRAFT = 5, 2
"""Tokens of the longest context, of the target and of the draft."""
DRAFT_TEMPERATURE = 1.2
"""Makes the draft differ from the target even where the target knows no longer context."""
END = 1
ID_BITS = 18
HASH_FACTOR = np.uint64(0x9E3779B97F4A7C15)
TEXT_BYTES = 40_000_000


def context_hashes(tokens, longest):
    """Yields hashes of the 1 to `longest` tokens before each place, uint64 [len(tokens)] for each length.

    The lowest ID_BITS are 0. The few places with fewer tokens before them get the hash of no tokens.
    """
    values = tokens.astype(np.uint64) + np.uint64(1)
    rolling = np.zeros(len(tokens), np.uint64)
    for length in range(1, longest + 1):
        shifted = np.zeros_like(values)
        shifted[length:] = values[:-length]
        rolling = (rolling ^ shifted) * HASH_FACTOR
        rolling ^= rolling >> np.uint64(29)
        yield (rolling + np.uint64(length)) * HASH_FACTOR >> np.uint64(ID_BITS) << np.uint64(ID_BITS)


class NGrams:
    """Counts of the tokens that follow each context."""

    def __init__(self, tokens, vocab_size, longest):
        counts = np.bincount(tokens, minlength=vocab_size) + 0.1
        self.base = (counts / counts.sum()).astype(np.float32)
        hashes = context_hashes(tokens, longest)
        self.tables = [np.unique(each | tokens.astype(np.uint64), return_counts=True) for each in hashes]

    def probs(self, contexts, longest):
        """Returns the probabilities of the next token, float32 [N, V].

        Args:
            contexts: Hashes of the contexts of N places, uint64 [N] for each length.
            longest: Number of tokens of the longest context to use.
        """
        found = np.empty((len(contexts[0]), len(self.base)), np.float32)
        left = np.ones(len(found))
        parts = [[] for _ in found]
        for length in range(longest, 0, -1):
            keys, counts = self.tables[length - 1]
            hashes = contexts[length - 1]
            starts = np.searchsorted(keys, hashes)
            stops = np.searchsorted(keys, hashes + np.uint64(1 << ID_BITS))
            for row in np.flatnonzero(stops > starts):
                here = slice(starts[row], stops[row])
                followed, kinds = int(counts[here].sum()), int(stops[row] - starts[row])
                ids = (keys[here] & np.uint64((1 << ID_BITS) - 1)).astype(np.int64)
                parts[row].append((ids, counts[here] * (left[row] / (followed + kinds))))
                left[row] *= kinds / (followed + kinds)
        for row, each in enumerate(parts):
            found[row] = self.base * np.float32(left[row])
            for ids, values in each:
                found[row, ids] += values.astype(np.float32)
        return found


@dataclass(kw_only=True)
class NGramDistribution:
    """The n-grams at a temperature. They are counted at the first use."""

    name: str = "ngrams"
    temperature: float = 1.0
    text: Literal["held_out", "seen"] = "held_out"
    """Whether the standard library, from which the functions are taken, is left out of the counts or included."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return RECIPES[TOKENIZER_OF].vocab_size

    @functools.cached_property
    def documents(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Ids [T] and loss mask [T] of each document of the text."""
        return list(encode(tokenizer(), functions(held_out=True)))

    def chunks(self, num_rows: int, rows_per_chunk: int = 256):
        """Yields chunks of the first num_rows rows that count."""
        grams = counted(self.text)
        places = [(ids, np.flatnonzero(mask) + 1) for ids, mask in self.documents]
        labels = np.concatenate([ids[place] for ids, place in places])
        hashes = [np.stack(list(context_hashes(ids, LONGEST)))[:, place] for ids, place in places]
        contexts = np.concatenate(hashes, axis=1)
        for start in range(0, min(num_rows, len(labels)), rows_per_chunk):
            here = slice(start, min(start + rows_per_chunk, num_rows))
            logprobs = [
                (torch.from_numpy(grams.probs(contexts[:, here], longest)).log() / temperature).log_softmax(-1)
                for longest, temperature in (
                    (LONGEST, self.temperature),
                    (LONGEST_OF_DRAFT, self.temperature * DRAFT_TEMPERATURE),
                )
            ]
            yield Chunk(labels=torch.from_numpy(labels[here]), logprobs=logprobs[0], draft=logprobs[1])


@functools.cache
def tokenizer():
    return AutoTokenizer.from_pretrained(_distributions.FOLDER / TOKENIZER_OF / "tokenizer")


@functools.cache
def counted(text):
    """Counts the installed text. Its tokens are cached in a file."""
    path = _distributions.FOLDER / f"ngrams_{text}.npy"
    if not path.exists():
        backend, roots = tokenizer().backend_tokenizer, TEXT_ROOTS[text == "held_out" :]
        ids = (backend.encode(each, add_special_tokens=False).ids for each in texts(TEXT_BYTES, roots))
        np.save(path, np.concatenate([np.array([*each, END], np.uint32) for each in ids]))
    return NGrams(np.load(path), RECIPES[TOKENIZER_OF].vocab_size, LONGEST)
