"""Truncates distributions on the device: keeps the likeliest entries of each row, or draws entries at random.

N: number of rows. V: vocabulary size. K: largest number of entries in a row (`TargetSpec.room`).
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
"""Number of tokens in a block for which `_first_above` computes one sum."""


class Kept(NamedTuple):
    """N truncated rows, in the form in which they are stored."""

    token_ids: Tensor
    """Int32 [N, K]: ids of the entries of each row, in ascending order, padded with V."""
    codes: Tensor
    """Uint8 [N, K]: codes of the logprobs of the entries; the values of the padding have no meaning."""
    draws: Tensor
    """Int32 [N, K]: number of times that `sample` drew each id; 0 for the other schemes."""
    counts: Tensor
    """Int32 [N]: number of entries in each row."""
    tail: Tensor
    """Float32 [N], nats: log of the tail mass; minus infinity if the tail mass is 0."""
    label_logprob: Tensor
    """Float32 [N], nats: logprob of the label, the token that follows the row."""
    entropy: Tensor
    """Float32 [N], nats: entropy over the whole vocabulary."""


def uniforms(spec: TargetSpec, shard: int, num_rows: int) -> NDArray[np.float64]:
    """Returns the random numbers for the draws of a shard.

    The numbers depend only on the seed, the shard and the position of the row among the rows that count. A process
    that scores the shard again thus uses the same numbers.

    Args:
        spec: Scheme and seed.
        shard: Number of the shard.
        num_rows: Number of rows in the shard that count.

    Returns:
        Float64 in [0, 1): [num_rows, num_draws] for `sample`, [num_rows, 1] for `hybrid`, [num_rows, 0] for the others.
    """
    per_row = {"sample": spec.scheme.num_draws, "hybrid": 1}.get(spec.scheme.name, 0)
    generator = np.random.Generator(np.random.Philox(key=np.array([spec.scheme.seed, shard], dtype=np.uint64)))
    return generator.random((num_rows, per_row))


def truncate(logits: Tensor, labels: Tensor, spec: TargetSpec, boundaries: Tensor, uniform: Tensor) -> Kept:
    """Truncates distributions, or draws from them, and turns the logprobs of the kept entries into codes.

    Args:
        logits: Float32 [N, V].
        labels: Int64 [N]: the token that follows each row.
        spec: Scheme and codebook.
        boundaries: Boundaries of the codebook, float32 [255], on the device of the logits.
        uniform: Random numbers of these rows, as returned by `uniforms`.

    Returns:
        The N rows. If the logits of a row are NaN, the values of the row have no meaning, and the caller must set the
        row's document aside.
    """
    logprobs = logits.log_softmax(-1)
    probs = logprobs.exp()
    # With 262,144 tokens, float32 log_softmax on a CPU has an error of up to 1e-3, which is the same for all tokens of
    # a row. `excess` is this error; it is subtracted wherever a logprob is used below.
    total = probs.sum(-1, keepdim=True)
    excess = total.log()
    entropy = excess[:, 0] - (probs * logprobs).nansum(-1) / total[:, 0]  # 0 log 0 is NaN, but counts as 0.
    if spec.scheme.name == "sample":
        token_ids, draws = _sample(probs, uniform)
    else:
        token_ids = _hybrid(logprobs, probs, excess, spec, uniform) if spec.scheme.draws else _likeliest(logprobs, spec)
        draws = torch.zeros_like(token_ids)
    used = token_ids < logits.shape[1]
    # Padding points at the row's first entry. Only rows of NaN may have no entry. The caller sets these rows aside, and
    # the clamp keeps their ids within the vocabulary.
    places = token_ids.where(used, token_ids[:, :1]).clamp_max(logits.shape[1] - 1)
    kept = logprobs.gather(1, places) - excess
    return Kept(
        token_ids=token_ids.int(),
        codes=_codes(kept, used, spec, boundaries),
        draws=draws.int(),
        counts=used.sum(-1, dtype=torch.int32),
        # The tail mass is summed over the other tokens. For a small tail, 1 - (sum of the kept) would be mostly
        # rounding error.
        tail=(probs.scatter_(1, places, 0.0).sum(-1, keepdim=True).log() - excess)[:, 0],
        label_logprob=(logprobs.gather(1, labels[:, None]) - excess)[:, 0],
        entropy=entropy,
    )


def _codes(kept: Tensor, used: Tensor, spec: TargetSpec, boundaries: Tensor) -> Tensor:
    """Turns logprobs into codes in the same way as `codec.encode`.

    An entry may have the same code as the row's likeliest entry although the entry's logprob is smaller. The entry then
    gets the next code, so that the likeliest entry can be recognised after decoding. The entry keeps its code in two
    cases: the last code of the codebook has no next code, and the code after `last_exact_code` would mark the entry as
    drawn.
    """
    codes = torch.bucketize(-kept, boundaries)
    kept = kept.where(used, -torch.inf)
    is_shared = (codes == codes.where(used, LEVELS).amin(-1, keepdim=True)) & (kept < kept.amax(-1, keepdim=True))
    return (codes + (is_shared & (codes != spec.last_exact_code) & (codes != LEVELS - 1))).to(torch.uint8)


def _likeliest(logprobs: Tensor, spec: TargetSpec) -> Tensor:
    """Returns the sorted ids of the k likeliest tokens, or of their nucleus; int64 [N, k], padded with V."""
    scheme, vocab_size = spec.scheme, logprobs.shape[1]
    top = logprobs.topk(scheme.k, dim=-1)
    token_ids = top.indices
    if scheme.name == "nucleus":
        probs = top.values.exp()
        # A token is dropped if the likelier tokens reach the mass without it.
        is_beyond = probs.cumsum(-1) - probs >= scheme.mass
        is_beyond[:, : scheme.k_min] = False
        token_ids = token_ids.masked_fill(is_beyond, vocab_size)
    return token_ids.sort(-1).values


def _sample(probs: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draws n tokens of each row independently from its probabilities, with replacement (RS-KD, arXiv 2503.16870).

    Args:
        probs: Float32 [N, V].
        uniform: Float64 [N, n]: one random number in [0, 1) for each draw.

    Returns:
        Two int64 tensors [N, n]: the distinct ids in ascending order, padded with V; and the number of times that each
        id was drawn, padded with 0. In each row, the numbers of draws add up to n.
    """
    drawn = _first_above(probs, uniform, of_sum=True).sort(-1).values
    is_new = torch.ones_like(drawn)
    is_new[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    slots = is_new.cumsum(-1) - 1  # Place of the id of each draw among the distinct ids of the row.
    token_ids = torch.full_like(drawn, probs.shape[1]).scatter_(1, slots, drawn)
    return token_ids, torch.zeros_like(drawn).scatter_add_(1, slots, torch.ones_like(drawn))


def _first_above(mass: Tensor, marks: Tensor, *, of_sum: bool = False) -> Tensor:
    """Finds the first token at which the cumulative sum of a row exceeds each mark.

    The cumulative sum is in float64: with a float32 sum, a third of 262,144 tokens would never be found. But on a CPU,
    a float64 cumulative sum takes ten times as long as a softmax. If there are few marks, the sum therefore runs over
    blocks of tokens first, and over single tokens only in the blocks that contain a mark.

    Args:
        mass: Float32 [N, V], at least 0.
        marks: Float64 [N, M], at least 0.
        of_sum: Whether the marks are fractions of the row's sum, all below 1.

    Returns:
        Ids, int64 [N, M]; V for marks that the row's sum does not exceed. Rows of NaN may give V too. A token of mass 0
        is never returned.
    """
    num_rows, vocab_size = mass.shape
    in_blocks = marks.shape[1] * BLOCK < vocab_size
    if in_blocks:
        mass = torch.nn.functional.pad(mass, (0, -vocab_size % BLOCK)).view(num_rows, -1, BLOCK)
    ends = (mass.sum(-1).double() if in_blocks else mass.double()).cumsum(-1)
    if of_sum:
        # By rounding, a mark may reach the row's sum. The limit keeps it below the sum, so a token is always found.
        marks = torch.minimum(marks * ends[:, -1:], ends[:, -1:].nextafter(torch.zeros_like(marks[:, :1])))
    found = torch.searchsorted(ends, marks, right=True)
    if not in_blocks:
        return found
    is_beyond = found == ends.shape[1]
    block = found.clamp_max(ends.shape[1] - 1)
    inside = mass.gather(1, block[..., None].expand(-1, -1, BLOCK)).cumsum(-1, dtype=torch.float64)
    before = torch.nn.functional.pad(ends, (1, 0)).gather(1, block)
    # The float32 sum of a block differs slightly from the float64 sum of its tokens. The limit keeps the mark inside
    # the block.
    rest = torch.minimum((marks - before).clamp_min(0.0), inside[..., -1].nextafter(torch.zeros_like(marks)))
    place = torch.searchsorted(inside, rest[..., None], right=True)[..., 0]
    return (block * BLOCK + place).masked_fill(is_beyond, vocab_size).clamp_max(vocab_size)


def _hybrid(logprobs: Tensor, probs: Tensor, excess: Tensor, spec: TargetSpec, uniform: Tensor) -> Tensor:
    """Keeps tokens whose code stands for a probability of at least `step`, and draws from the others systematically.

    Systematic drawing puts the probabilities of the other tokens in a line, one after another, and draws the token at
    every `step` along the line. A token of probability p is drawn at most once, and with probability p / step. If each
    drawn token has the weight `step`, the weights are thus unbiased estimates of the probabilities. For a given mean
    number of draws, the variance is smallest if all draws have the same weight, and if this weight is smaller than the
    probabilities of the kept tokens.

    Args:
        logprobs: Float32 [N, V], before `excess` is subtracted.
        probs: Float32 [N, V], the exponential of `logprobs`.
        excess: Float32 [N, 1]: log of the sum of `probs`.
        spec: Scheme and codebook.
        uniform: Float64 [N, 1] in [0, 1): position of the first draw within the first step.

    Returns:
        Ids in ascending order, int64 [N, K], padded with V.
    """
    vocab_size, step = probs.shape[1], spec.step
    boundary = float(spec.codebook.boundaries[spec.last_exact_code])
    # At most 1 / step tokens can have a probability of at least `step`.
    top = logprobs.topk(min(int(1 / step), vocab_size), dim=-1)
    is_likely = excess - top.values <= boundary
    likely = top.indices.masked_fill(~is_likely, vocab_size)
    mass = probs.scatter(1, top.indices, probs.gather(1, top.indices).masked_fill(is_likely, 0.0))
    marks = (torch.arange(1, spec.room + 1, device=probs.device) - uniform) * step * excess.double().exp()
    token_ids = torch.cat([likely, _first_above(mass, marks)], dim=-1).sort(-1).values
    # By rounding, two marks may fall on the same token if its probability is just below `step`. It is kept only once.
    is_again = torch.zeros_like(token_ids, dtype=torch.bool)
    is_again[:, 1:] = token_ids[:, 1:] == token_ids[:, :-1]
    return token_ids.masked_fill_(is_again, vocab_size).sort(-1).values[:, : spec.room]
