"""An encoder of rows in NumPy, by the definition in docs/format.md: the dump codes logprobs on its device instead."""

from __future__ import annotations

import numpy as np

from logitstore.format.codebook import LEVELS
from logitstore.rows import codec


def encode_rows(rows, spec):
    """The arrays of a `target` shard that hold some rows; `codec.decode` inverts it up to the error of the codes."""
    with np.errstate(divide="ignore"):  # nothing left out: -inf
        tail = np.log(rows.tail_mass)
    draws = np.zeros(len(rows.token_ids), dtype=np.uint16)
    if spec.scheme.name == "sample" and rows.weights is not None:
        draws[:] = np.rint(rows.weights * spec.scheme.num_draws)
    return codec.pack(
        counts=rows.counts, token_ids=rows.token_ids, codes=codes_of(spec, rows.logprobs, rows.counts), draws=draws,
        tail=tail, label_logprob=rows.label_logprob, entropy=rows.entropy,
    )  # fmt: skip


def codes_of(spec, logprobs, counts):
    """Codes of logprobs: entries that share the code of their row's likeliest entry get the next code.

    Not beyond the last code, nor beyond the last one of entries that `hybrid` keeps exactly.
    """
    codes = spec.codebook.encode(logprobs)
    kept = counts[counts > 0].astype(np.int64)
    if not len(kept):
        return codes
    first = np.cumsum(kept) - kept
    row = np.repeat(np.arange(len(kept)), kept)
    is_shared = codes == np.minimum.reduceat(codes, first)[row]
    is_shared &= logprobs < np.maximum.reduceat(logprobs, first)[row]
    codes += (is_shared & (codes != spec.last_exact_code) & (codes != LEVELS - 1)).astype(np.uint8)
    return codes
