"""Distributions -> the entries that a row keeps, on the device: the likeliest ones, or draws that stand for all.

N rows, V vocabulary, K most entries of a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from logitstore.codec import LEVELS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from logitstore.spec import TargetSpec


class Kept(NamedTuple):
    """What is stored of N rows."""

    token_ids: Tensor
    """Int32 [N, K], rising; V beyond a row's entries."""
    codes: Tensor
    """Uint8 [N, K]: codes of the logprobs."""
    draws: Tensor
    """Int32 [N, K]: how often each id was drawn by `sample`; else 0."""
    counts: Tensor
    """Int32 [N]: entries of each row."""
    tail: Tensor
    """Float32 [N]: log of the tail mass."""
    label_logprob: Tensor
    """Float32 [N]."""
    entropy: Tensor
    """Float32 [N]."""


def uniforms(spec: TargetSpec, shard: int, num_rows: int) -> NDArray[np.float64]:
    """Returns the random numbers that a shard's draws are made from: those of a row depend on its place alone.

    Args:
        spec: Scheme and seed.
        shard: Which shard.
        num_rows: Rows of it that count.

    Returns:
        In [0, 1): [num_rows, num_draws] for `sample`, [num_rows, 1] for `hybrid`, [num_rows, 0] for the others.
    """
    per_row = {"sample": spec.scheme.num_draws, "hybrid": 1}.get(spec.scheme.name, 0)
    generator = np.random.Generator(np.random.Philox(key=np.array([spec.scheme.seed, shard], dtype=np.uint64)))
    return generator.random((num_rows, per_row))


def truncate(logits: Tensor, labels: Tensor, spec: TargetSpec, boundaries: Tensor, uniform: Tensor) -> Kept:
    """Truncates distributions, or draws from them, and codes what is kept.

    Args:
        logits: Float32 [N, V].
        labels: Int64 [N].
        spec: Scheme and codebook.
        boundaries: The codebook's, float32 [255].
        uniform: The rows' numbers from `uniforms`.
    """
    logprobs = logits.log_softmax(-1)
    probs = logprobs.exp()
    entropy = -torch.linalg.vecdot(probs, logprobs)
    if spec.scheme.name == "sample":
        token_ids, draws = _sample(probs, uniform)
    else:
        token_ids = _hybrid(logprobs, probs, spec, uniform) if spec.scheme.draws else _likeliest(logprobs, spec)
        draws = torch.zeros_like(token_ids)
    used = token_ids < logits.shape[1]
    places = token_ids.where(used, token_ids[:, :1])  # every row keeps something
    kept = logprobs.gather(1, places)
    return Kept(
        token_ids=token_ids.int(),
        codes=_codes(kept, used, spec, boundaries),
        draws=draws.int(),
        counts=used.sum(-1, dtype=torch.int32),
        # Summing what is left keeps a small tail true, where 1 - (sum of the kept) would be rounding error.
        tail=probs.scatter_(1, places, 0.0).sum(-1).log(),
        label_logprob=logprobs.gather(1, labels[:, None])[:, 0],
        entropy=entropy,
    )


def _codes(kept: Tensor, used: Tensor, spec: TargetSpec, boundaries: Tensor) -> Tensor:
    """Codes logprobs as `codec.encode` does: the likeliest entry's code is no other's."""
    codes = torch.bucketize(-kept, boundaries)
    kept = kept.where(used, -torch.inf)
    is_shared = (codes == codes.where(used, LEVELS).amin(-1, keepdim=True)) & (kept < kept.amax(-1, keepdim=True))
    return (codes + (is_shared & (codes != spec.last_exact_code) & (codes != LEVELS - 1))).to(torch.uint8)


def _likeliest(logprobs: Tensor, spec: TargetSpec) -> Tensor:
    """Returns the ids of the k likeliest tokens, or of the nucleus among them; int64 [N, k], rising, V where fewer."""
    scheme, vocab_size = spec.scheme, logprobs.shape[1]
    top = logprobs.topk(scheme.k, dim=-1)
    token_ids = top.indices
    if scheme.name == "nucleus":
        probs = top.values.exp()
        is_beyond = probs.cumsum(-1) - probs >= scheme.mass
        is_beyond[:, : scheme.k_min] = False
        token_ids = token_ids.masked_fill(is_beyond, vocab_size)
    return token_ids.sort(-1).values


def _sample(probs: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draws independently from p (RS-KD, arXiv 2503.16870).

    Args:
        probs: Float32 [N, V].
        uniform: Float64 [N, n].

    Returns:
        Distinct ids, int64 [N, n], rising, V where fewer; and how often each was drawn, n in all.
    """
    cdf = probs.cumsum(-1, dtype=torch.float64)  # in float32 a third of 262,144 tokens would never be drawn
    drawn = torch.searchsorted(cdf, uniform * cdf[:, -1:], right=True).clamp_max(probs.shape[1] - 1).sort(-1).values
    is_new = torch.ones_like(drawn)
    is_new[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    slots = is_new.cumsum(-1) - 1
    token_ids = torch.full_like(drawn, probs.shape[1]).scatter_(1, slots, drawn)
    return token_ids, torch.zeros_like(drawn).scatter_add_(1, slots, torch.ones_like(drawn))


def _hybrid(logprobs: Tensor, probs: Tensor, spec: TargetSpec, uniform: Tensor) -> Tensor:
    """Keeps what has a code at or above `step`, and draws systematically from the rest: one id at every `step` of it.

    An unlikely token is drawn with probability p / step, once at most, so that standing for `step` it is unbiased; of
    all such draws of a given mean number, those with equal weights that fall below the likely tokens' vary least.

    Args:
        logprobs: Float32 [N, V].
        probs: Float32 [N, V].
        spec: Scheme and codebook.
        uniform: Float64 [N, 1]: where in the first step the draws begin.

    Returns:
        Ids, int64 [N, K], rising, V where fewer.
    """
    vocab_size, step = probs.shape[1], spec.step
    boundary = float(spec.codebook.boundaries[spec.last_exact_code])
    top = logprobs.topk(min(int(1 / step), vocab_size), dim=-1)
    likely = top.indices.masked_fill(-top.values > boundary, vocab_size)
    mass = probs.masked_fill(-logprobs <= boundary, 0.0).cumsum(-1, dtype=torch.float64)
    marks = (torch.arange(1, spec.room + 1, device=probs.device) - uniform) * step
    drawn = torch.searchsorted(mass, marks).masked_fill(marks > mass[:, -1:], vocab_size)
    token_ids = torch.cat([likely, drawn], dim=-1).sort(-1).values
    # Rounding may let two marks fall on one token whose probability is just below a step.
    is_again = torch.zeros_like(token_ids, dtype=torch.bool)
    is_again[:, 1:] = token_ids[:, 1:] == token_ids[:, :-1]
    return token_ids.masked_fill_(is_again, vocab_size).sort(-1).values[:, : spec.room]
