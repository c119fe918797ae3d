"""Other formats, re-implemented from their descriptions for comparison, without using their code.

Each format encodes the entries of N rows, without the tokens, into the bytes that it would store. Its decoder returns
the values that its reader passes to a training step: ids as int64, and logprobs.

- DistillKit (arcee-ai, 2026-03): the k likeliest tokens, ids in ceil(log2 V) bits each, most significant first. The
  first few logprobs are in bfloat16, the others are coefficients of a least-squares fit over their rank, in float32
  through an SVD, with ranks not mapped to [0, 1]. One Parquet row per document, one list of bytes per position. The
  reader makes Python lists and then int64 tensors, and unpacks ids bit by bit. Training renormalises.
- RS-KD (arXiv 2503.16870): 3 bytes per entry, 17 bits for the id and 7 for the number of draws. Its code is not
  released: here the number of entries of a row takes one byte, and the reader is the fastest possible in NumPy.
- Parquet lists: int32 ids and float16 logprobs of each position as lists, with zstd; read as flat arrays.
- raw NumPy: the same values as two rectangular arrays.

N rows, K entries of a row, E entries in all, T positions of a document.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

RSKD_COUNT_BITS = 7
RSKD_ENTRY_BYTES = 3


class Top(NamedTuple):
    """The likeliest tokens of N rows, in order of probability."""

    token_ids: np.ndarray
    """Int64 [N, K]."""
    logprobs: np.ndarray
    """Float32 [N, K]."""


class Drawn(NamedTuple):
    """The drawn tokens of N rows."""

    counts: np.ndarray
    """Int64 [N]: number of distinct tokens of each row."""
    token_ids: np.ndarray
    """Int64 [E]."""
    draws: np.ndarray
    """Int64 [E]: number of draws of each token."""


def pack_bits(values, width):
    """Packs int64 [N, K] into `width` bits each, most significant first. Returns uint8 [N, ceil(K * width / 8)]."""
    octets = values.astype(">u4").view(np.uint8).reshape(*values.shape, 4)
    bits = np.unpackbits(octets, axis=-1)[..., 32 - width :]
    return np.packbits(bits.reshape(len(values), -1), axis=-1)


def unpack_bits(packed, width, num):
    """Unpacks uint8 [T, bytes] to int64 [T, num], with one int64 per bit in between as in DistillKit's reader."""
    shifts = torch.arange(7, -1, -1)
    bits = (packed.long()[..., None] >> shifts) & 1
    bits = bits.flatten(-2)[:, : num * width].unflatten(-1, (num, width))
    return (bits << torch.arange(width - 1, -1, -1)).sum(-1)


@dataclass(frozen=True, kw_only=True)
class DistillKit:
    """DistillKit's packed top-k."""

    name: str
    vocab_size: int
    k: int
    exact_k: int
    terms: tuple[int | str, ...] = ()
    """Terms of the fit: powers of the rank, or "sqrt"."""

    @property
    def width(self):
        return math.ceil(math.log2(self.vocab_size))

    @property
    def payload_bytes(self):
        """Bytes per row before Parquet."""
        return -(-self.k * self.width // 8) + 2 * self.exact_k + 4 * len(self.terms)

    def encode(self, top, lengths):
        """Returns a Parquet file of documents with the given numbers of positions."""
        ids = pack_bits(top.token_ids[:, : self.k], self.width)
        values = torch.from_numpy(top.logprobs[:, : self.k])
        parts = [values[:, : self.exact_k].bfloat16().contiguous().view(torch.uint8)]
        if self.terms:
            parts.append(self._fit(values[:, self.exact_k :]).contiguous().view(torch.uint8))
        logprobs = torch.cat(parts, dim=-1).numpy()
        names = {"compressed_logprobs": logprobs, "bytepacked_indices": ids}
        table = pa.table({name: nested(values, lengths) for name, values in names.items()})
        return to_parquet(table)

    def _design(self, num):
        ranks = torch.arange(num, dtype=torch.float32)
        return torch.stack([ranks.sqrt() if term == "sqrt" else ranks**term for term in self.terms], dim=-1)

    def _fit(self, values):
        left, singular, right = torch.linalg.svd(self._design(values.shape[1]), full_matrices=False)
        inverse = torch.where(singular > 1e-5, 1 / singular, 0.0)
        return (values @ left * inverse) @ right

    def decode(self, data):
        """Returns int64 ids and logprobs [N, k]: bfloat16 if all are exact, otherwise float32."""
        columns = pq.read_table(io.BytesIO(data), use_threads=False)
        found = []
        for row in range(len(columns)):
            octets = {name: torch.tensor(columns[name][row].as_py()).to(torch.uint8) for name in columns.column_names}
            found.append((unpack_bits(octets["bytepacked_indices"], self.width, self.k), self._logprobs(octets)))
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))

    def _logprobs(self, octets):
        stored = octets["compressed_logprobs"]
        parts = [stored[:, : 2 * self.exact_k].contiguous().view(torch.bfloat16)]
        if self.terms:
            coefficients = stored[:, 2 * self.exact_k :].contiguous().view(torch.float32)
            fitted = (self._design(self.k - self.exact_k) * coefficients[:, None, :]).sum(-1)
            parts.append(fitted)
        return torch.cat(parts, dim=-1)


def distillkit(vocab_size):
    """Returns DistillKit's presets."""
    terms = (0, 1, 2, 3, 4, "sqrt")
    return [
        DistillKit(name="DistillKit top-64 bf16", vocab_size=vocab_size, k=64, exact_k=64),
        DistillKit(name="DistillKit k64/e16/6 terms", vocab_size=vocab_size, k=64, exact_k=16, terms=terms),
        DistillKit(name="DistillKit README k128/e16/6", vocab_size=vocab_size, k=128, exact_k=16, terms=terms),
    ]


def nested(values, lengths):
    """Converts uint8 [N, bytes] to an Arrow array of list<list<uint8>>, one per document."""
    inner = np.arange(0, values.size + 1, values.shape[1], dtype=np.int32)
    outer = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(outer, pa.ListArray.from_arrays(inner, pa.array(values.ravel())))


def to_parquet(table, **options):
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


@dataclass(frozen=True, kw_only=True)
class RsKd:
    """RS-KD's draws in 3 bytes per entry."""

    name: str = "RS-KD 3-byte, 50 draws"

    def encode(self, drawn):
        """Returns one byte per row, then 3 bytes per entry."""
        if drawn.token_ids.max(initial=0) >= 1 << 17 or drawn.draws.max(initial=0) >= 1 << RSKD_COUNT_BITS:
            raise ValueError("ids must be below 2**17 and draws below 2**7 in 3 bytes")
        words = (drawn.token_ids << RSKD_COUNT_BITS | drawn.draws).astype("<u4")
        entries = words.view(np.uint8).reshape(-1, 4)[:, :RSKD_ENTRY_BYTES]
        return drawn.counts.astype(np.uint8).tobytes() + entries.tobytes()

    def decode(self, data, num_rows):
        """Returns the rows that were encoded."""
        counts = np.frombuffer(data, np.uint8, num_rows).astype(np.int64)
        entries = np.frombuffer(data, np.uint8, offset=num_rows).reshape(-1, RSKD_ENTRY_BYTES)
        words = np.zeros((len(entries), 4), np.uint8)
        words[:, :RSKD_ENTRY_BYTES] = entries
        words = words.view("<u4")[:, 0].astype(np.int64)
        return Drawn(counts, words >> RSKD_COUNT_BITS, words & (1 << RSKD_COUNT_BITS) - 1)


@dataclass(frozen=True, kw_only=True)
class ParquetLists:
    """Lists of ids and logprobs, one Parquet row per position."""

    k: int
    dtype: type = np.float16

    @property
    def name(self):
        return f"Parquet lists, top-{self.k}, {np.dtype(self.dtype).name}, zstd"

    def encode(self, top):
        offsets = np.arange(0, len(top.token_ids) * self.k + 1, self.k, dtype=np.int32)
        columns = {
            "token_ids": top.token_ids[:, : self.k].astype(np.int32),
            "logprobs": top.logprobs[:, : self.k].astype(self.dtype),
        }
        table = {name: pa.ListArray.from_arrays(offsets, pa.array(v.ravel())) for name, v in columns.items()}
        return to_parquet(pa.table(table), compression="zstd")

    def decode(self, data):
        """Returns int64 ids and float32 logprobs [N, k]."""
        table = pq.read_table(io.BytesIO(data), use_threads=False)
        flat = [table[name].combine_chunks().flatten().to_numpy() for name in ("token_ids", "logprobs")]
        return flat[0].reshape(-1, self.k).astype(np.int64), flat[1].reshape(-1, self.k).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class RawNumPy:
    """Two .npy arrays, one after the other."""

    k: int = 64

    @property
    def name(self):
        return f"raw NumPy, top-{self.k}, int32 + float16"

    def encode(self, top):
        sink = io.BytesIO()
        np.save(sink, top.token_ids[:, : self.k].astype(np.int32))
        np.save(sink, top.logprobs[:, : self.k].astype(np.float16))
        return sink.getvalue()

    def decode(self, data):
        """Returns int64 ids and float32 logprobs [N, k]."""
        source = io.BytesIO(data)
        return np.load(source).astype(np.int64), np.load(source).astype(np.float32)
