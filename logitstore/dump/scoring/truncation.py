"""Distributions -> the entries that a row keeps, on the device: the likeliest ones, or draws that stand for all.

N rows, V vocabulary, K most entries of a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from logitstore.format.codebook import LEVELS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from logitstore.format.spec import TargetSpec


BLOCK = 256
"""Tokens whose probabilities are added up first where draws look for theirs."""


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
    # Of 262,144 tokens a CPU's float32 log_softmax is off by up to 1e-3, all tokens of a row by the same.
    total = probs.sum(-1, keepdim=True)
    excess = total.log()
    entropy = excess[:, 0] - (probs * logprobs).nansum(-1) / total[:, 0]  # 0 log 0 is 0
    if spec.scheme.name == "sample":
        token_ids, draws = _sample(probs, uniform)
    else:
        token_ids = _hybrid(logprobs, probs, excess, spec, uniform) if spec.scheme.draws else _likeliest(logprobs, spec)
        draws = torch.zeros_like(token_ids)
    used = token_ids < logits.shape[1]
    # Every row keeps something, but those of NaN: they are set aside, and must not lead anywhere until then.
    places = token_ids.where(used, token_ids[:, :1]).clamp_max(logits.shape[1] - 1)
    kept = logprobs.gather(1, places) - excess
    return Kept(
        token_ids=token_ids.int(),
        codes=_codes(kept, used, spec, boundaries),
        draws=draws.int(),
        counts=used.sum(-1, dtype=torch.int32),
        # Summing what is left keeps a small tail true, where 1 - (sum of the kept) would be rounding error.
        tail=(probs.scatter_(1, places, 0.0).sum(-1, keepdim=True).log() - excess)[:, 0],
        label_logprob=(logprobs.gather(1, labels[:, None]) - excess)[:, 0],
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
    drawn = _first_above(probs, uniform, of_sum=True).sort(-1).values
    is_new = torch.ones_like(drawn)
    is_new[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    slots = is_new.cumsum(-1) - 1
    token_ids = torch.full_like(drawn, probs.shape[1]).scatter_(1, slots, drawn)
    return token_ids, torch.zeros_like(drawn).scatter_add_(1, slots, torch.ones_like(drawn))


def _first_above(mass: Tensor, marks: Tensor, *, of_sum: bool = False) -> Tensor:
    """Finds the token at which the cumulative sum of each row is first above each mark.

    In float64, since in float32 a third of 262,144 tokens would never be met; but for few marks in blocks of tokens, of
    which only those that marks fall into are added up one by one: a float64 cumulative sum costs a CPU ten times a
    softmax.

    Args:
        mass: Float32 [N, V], at least 0.
        marks: Float64 [N, M], at least 0.
        of_sum: Whether marks are shares of the row's sum, all below 1.

    Returns:
        Ids, int64 [N, M], none of which has mass 0; V for marks that the sum does not exceed, and for NaN perhaps.
    """
    num_rows, vocab_size = mass.shape
    in_blocks = marks.shape[1] * BLOCK < vocab_size
    if in_blocks:
        mass = torch.nn.functional.pad(mass, (0, -vocab_size % BLOCK)).view(num_rows, -1, BLOCK)
    ends = (mass.sum(-1).double() if in_blocks else mass.double()).cumsum(-1)
    if of_sum:
        marks = torch.minimum(marks * ends[:, -1:], ends[:, -1:].nextafter(torch.zeros_like(marks[:, :1])))
    found = torch.searchsorted(ends, marks, right=True)
    if not in_blocks:
        return found
    is_beyond = found == ends.shape[1]
    block = found.clamp_max(ends.shape[1] - 1)
    inside = mass.gather(1, block[..., None].expand(-1, -1, BLOCK)).cumsum(-1, dtype=torch.float64)
    before = torch.nn.functional.pad(ends, (1, 0)).gather(1, block)
    # The block's own sum, in float32, may be a little more or less than its end says.
    rest = torch.minimum((marks - before).clamp_min(0.0), inside[..., -1].nextafter(torch.zeros_like(marks)))
    place = torch.searchsorted(inside, rest[..., None], right=True)[..., 0]
    return (block * BLOCK + place).masked_fill(is_beyond, vocab_size).clamp_max(vocab_size)


def _hybrid(logprobs: Tensor, probs: Tensor, excess: Tensor, spec: TargetSpec, uniform: Tensor) -> Tensor:
    """Keeps what has a code at or above `step`, and draws systematically from the rest: one id at every `step` of it.

    An unlikely token is drawn with probability p / step, once at most, so that standing for `step` it is unbiased; of
    all such draws of a given mean number, those with equal weights that fall below the likely tokens' vary least.

    Args:
        logprobs: Float32 [N, V], too large by `excess`.
        probs: Float32 [N, V], likewise.
        excess: Float32 [N, 1]: log of the sum of `probs`.
        spec: Scheme and codebook.
        uniform: Float64 [N, 1]: where in the first step the draws begin.

    Returns:
        Ids, int64 [N, K], rising, V where fewer.
    """
    vocab_size, step = probs.shape[1], spec.step
    boundary = float(spec.codebook.boundaries[spec.last_exact_code])
    top = logprobs.topk(min(int(1 / step), vocab_size), dim=-1)
    is_likely = excess - top.values <= boundary
    likely = top.indices.masked_fill(~is_likely, vocab_size)
    mass = probs.scatter(1, top.indices, probs.gather(1, top.indices).masked_fill(is_likely, 0.0))
    marks = (torch.arange(1, spec.room + 1, device=probs.device) - uniform) * step * excess.double().exp()
    token_ids = torch.cat([likely, _first_above(mass, marks)], dim=-1).sort(-1).values
    # Rounding may let two marks fall on one token whose probability is just below a step.
    is_again = torch.zeros_like(token_ids, dtype=torch.bool)
    is_again[:, 1:] = token_ids[:, 1:] == token_ids[:, :-1]
    return token_ids.masked_fill_(is_again, vocab_size).sort(-1).values[:, : spec.room]
