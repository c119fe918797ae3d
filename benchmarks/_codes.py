"""Size of stored entries by the order of ids, the codebook and the settings of Blosc, on which the format is based.

E entries of N rows. Bits are per entry, of chunks as in a store, without the shard's index.
"""

from __future__ import annotations

import numpy as np
from numcodecs import Blosc

from logitstore.format.codebook import Codebook
from logitstore.format.layout import ENTRY_CHUNK
from logitstore.rows import codec
from logitstore.rows.codec import round_mantissa

SHOWN = ("topk 64", "nucleus 64 / 0.98", "hybrid 20", "hybrid 50")
LOG_RANGE_NATS, LOG_EXPONENT = 16.0, 2.0
"""Parameters of the previous codebook: logprobs down to -16, in growing steps."""
ROOTS = (2.0, 3.0, 4.0, 6.0)
DEFAULT = "root 4"


class Book:
    """A codebook: the logprobs of 256 codes."""

    def __init__(self, name, table):
        self.name, self.table = name, table
        self.boundaries = (table[1:] + table[:-1]) / -2

    def encode(self, logprobs):
        return np.searchsorted(self.boundaries, -logprobs).astype(np.uint8)


def books():
    steps = np.arange(256) / 255
    logs = Book(f"log, {LOG_RANGE_NATS:g} nats, power {LOG_EXPONENT:g}", -LOG_RANGE_NATS * steps**LOG_EXPONENT)
    return [logs, *(Book(f"root {root:g}", Codebook(exponent=root).table.astype(np.float64)) for root in ROOTS)]


def bits(values, *, shuffle=Blosc.SHUFFLE, level=5):
    """Returns bits per value after compression in chunks."""
    blosc = Blosc("zstd", clevel=level, shuffle=shuffle)
    whole = np.zeros(-(-len(values) // ENTRY_CHUNK) * ENTRY_CHUNK, values.dtype)  # padded to whole chunks as in a shard
    whole[: len(values)] = values
    chunks = whole.reshape(-1, ENTRY_CHUNK)
    return 8 * sum(len(blosc.encode(chunk)) for chunk in chunks) / len(values)


def orders(token_ids, logprobs, counts, frequency):
    """Yields the name of an order, the source index of each entry [E], and the stored value of its id, uint32 [E]."""
    row, vocab_size = np.repeat(np.arange(len(counts)), counts), len(frequency)
    place = np.empty(vocab_size, np.int64)
    place[np.argsort(-frequency, kind="stable")] = np.arange(vocab_size)
    ranked = np.lexsort((-logprobs, row))
    yield "by probability, ids", ranked, token_ids[ranked].astype(np.uint32)
    yield "by probability, ranks by frequency", ranked, place[token_ids[ranked]].astype(np.uint32)
    yield "rising, gaps of ids (the format)", np.arange(len(row)), codec.gaps(token_ids, counts)
    by_place = np.lexsort((place[token_ids], row))
    yield "rising, gaps of ranks by frequency", by_place, codec.gaps(place[token_ids[by_place]], counts)


def code_loss(codes, book, logprobs, tail, counts):
    """Returns the mean loss by rounding in nats per row, with probabilities scaled to 1 minus the stored tail."""
    first = np.cumsum(counts) - counts
    stored_tail = np.exp(round_mantissa(tail, codec.MANTISSA_BITS).astype(np.float64)).clip(1e-30, 1 - 2.0**-24)
    decoded = book.table[codes]
    shift = np.log1p(-stored_tail) - np.log(np.add.reduceat(np.exp(decoded), first))
    p, exact_tail = np.exp(logprobs), np.exp(tail.astype(np.float64)).clip(1e-30, 1)
    total = np.add.reduceat(p, first) + exact_tail  # normalised in float32, so the sum is 1 only within 1e-4
    logprobs = logprobs - np.repeat(np.log(total), counts)
    p, exact_tail = np.exp(logprobs), exact_tail / total
    kept = np.add.reduceat(p * (logprobs - decoded - np.repeat(shift, counts)), first)
    return float((kept + exact_tail * np.log(exact_tail / stored_tail)).mean())


def report(source, arrays_by_name, num_rows):
    """Yields lines of Markdown."""
    for name in SHOWN:
        arrays = arrays_by_name[name]
        counts = arrays["counts"].astype(np.int64)
        logprobs = arrays["exact_logprobs"].astype(np.float64)
        token_ids = codec.ungap(arrays["gaps"], counts)
        yield f"### {name}: {len(token_ids) / num_rows:.1f} entries a row"
        yield ""
        yield from _order_table(token_ids, logprobs, counts, source.vocab_size)
        yield ""
        yield from _book_table(logprobs, counts, arrays["exact_tail"])
        yield ""


def _order_table(token_ids, logprobs, counts, vocab_size):
    # Ranks counted on the same rows would reveal which few ids occur there, so they are counted on the first half.
    half, split = len(counts) // 2, int(counts[: len(counts) // 2].sum())
    frequency = np.bincount(token_ids[:split], minlength=vocab_size)
    token_ids, logprobs, counts = token_ids[split:], logprobs[split:], counts[half:]
    codes = next(book for book in books() if book.name == DEFAULT).encode(logprobs)
    yield "| bits an entry | byte shuffle | bit shuffle | none | byte shuffle, level 9 | codes beside | both |"
    yield "|---|---|---|---|---|---|---|"
    for name, places, stored in orders(token_ids, logprobs, counts, frequency):
        own, beside = bits(stored), bits(codes[places])
        cells = [own, bits(stored, shuffle=Blosc.BITSHUFFLE), bits(stored, shuffle=Blosc.NOSHUFFLE)]
        cells += [bits(stored, level=9), beside, own + beside]
        yield f"| {name} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |"


def _book_table(logprobs, counts, tail):
    ranked = np.lexsort((-logprobs, np.repeat(np.arange(len(counts)), counts)))
    yield "| book | nats lost | bits, rising ids | bit shuffle | level 9 | bits, by probability |"
    yield "|---|---|---|---|---|---|"
    for book in books():
        codes = book.encode(logprobs)
        cells = [bits(codes), bits(codes, shuffle=Blosc.BITSHUFFLE), bits(codes, level=9), bits(codes[ranked])]
        lost = code_loss(codes, book, logprobs, tail, counts)
        yield f"| {book.name} | {lost:.1e} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |"
