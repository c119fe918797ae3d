"""Acceptance rate of a draft from the cache: teacher-forced, on the stored rows, without the target.

How often a target accepts the draft's token after *its own documents'* text; what a served model accepts after text
that it wrote itself is measured by `trainer.speculative`. N rows, K entries per row at most, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
import torch

from logitstore import views
from logitstore.batches import batches
from logitstore.causal_lm import SplitLM, check_vocabulary, model_spec
from logitstore.errors import LayerNotFoundError
from logitstore.support import Support, acceptance_estimate, normalised, on_support, soft_cross_entropy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor
    from transformers import PreTrainedModel

    from logitstore import Store
    from logitstore.batches import Batch

BOUND_SLACK = 1e-5
"""Both bounds are moved outwards by this: more than float32 arithmetic, of the dump and here, errs by."""


@dataclass(frozen=True, kw_only=True)
class CachedAcceptance:
    """Means over the masked rows of a store. Teacher-forced: the text is the documents', not the draft's own."""

    documents: int
    """Documents read."""
    rows: int
    """Rows with loss mask 1 in them."""
    alpha_lower: float
    """No more than the mean of alpha = sum_v min(p_v, q_v): kept entries alone, at the worst that the codes allow."""
    alpha_upper: float
    """No less than the mean of alpha: the tail as one bucket, at the best that the codes allow."""
    alpha_estimate: float
    """A point estimate at the decoded values. Where rows are truncated sum_S min(p, q) + min(p_t, q_t): the codes'
    rounding makes it up to 0.005 low where q = p, the tail as one bucket makes it high. Where entries were drawn
    sum_S w min(1, q / p), unbiased but for that rounding."""
    argmax_agreement: float
    """Share of rows where the draft's likeliest token is the likeliest kept one: alpha of greedy decoding where that is
    the target's, see `argmax_known`."""
    argmax_known: float
    """Share of rows whose likeliest token is sure to be kept: all where rows are truncated; draws may miss it."""
    forward_kl: float
    """KL(p‖q), nats: on kept entries and the tail bucket, or estimated without bias where entries were drawn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowAcceptance:
    """What the means of CachedAcceptance are taken over; each float32 [N]."""

    alpha_lower: Tensor
    alpha_upper: Tensor
    alpha_estimate: Tensor
    argmax_agreement: Tensor
    argmax_known: Tensor
    forward_kl: Tensor


def expected_tokens_per_call(alpha: float, gamma: int) -> float:
    """Models the tokens per target call if each of `gamma` drafted tokens is accepted independently with `alpha`.

    (1 - alpha^(gamma + 1)) / (1 - alpha), gamma + 1 at alpha = 1. Real text is not i.i.d.: a model, not a measurement.
    """
    return sum(alpha**i for i in range(gamma + 1))


def row_acceptance(
    logprobs: Tensor,
    stored: Support,
    least: Support,
    most: Support,
    kept_from: float = math.inf,
) -> RowAcceptance:
    """Compares a draft with the stored distributions, row by row.

    Args:
        logprobs: Float32 [N, V] of the draft, normalised over the true vocabulary.
        stored: The decoded rows.
        least: The same entries at the least that their codes allow.
        most: And at the most.
        kept_from: The probability from which on tokens are kept without being drawn.

    Returns:
        N values each. The bounds bracket sum_v min(p_v, q_v) for every p that the codes allow.
    """
    kept, log_tail = on_support(logprobs, stored)
    q, q_tail = kept.exp().where(stored.used, 0.0), log_tail.exp()
    lower, upper = _alpha_bounds(least, most, q, q_tail)
    highest, place = stored.probs.max(-1, keepdim=True)
    likeliest = stored.token_ids.gather(1, place)[:, 0]
    is_known = torch.ones_like(lower)
    if stored.weights is not None:
        # A token that was missed has no more than the tail, and less than what is always kept.
        at_least = least.probs.gather(1, place)[:, 0]
        is_alone = (stored.probs == highest).sum(-1) == 1
        is_known = (is_alone & (at_least >= most.tail.clamp_max(kept_from))).float()
    return RowAcceptance(
        alpha_lower=lower,
        alpha_upper=upper,
        alpha_estimate=acceptance_estimate(stored, kept, log_tail),
        argmax_agreement=(logprobs.argmax(-1) == likeliest).float(),
        argmax_known=is_known,
        forward_kl=soft_cross_entropy(stored, kept, log_tail) - stored.entropy(),
    )


def _alpha_bounds(least: Support, most: Support, q: Tensor, q_tail: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds sum_v min(p_v, q_v) over all p between `least` and `most` that sum to 1. Float32 [N] each.

    Every p starts at its least, and what is missing to 1 (the budget) is handed out: for the upper bound first where
    it raises min(p, q), for the lower bound first where it raises it least. min(p, q) is concave in p, so that the
    chord from least to most is below it, and handing out by the chords' slopes gives a lower bound.
    """
    low = torch.cat([least.probs, least.tail[:, None]], dim=1)
    high = torch.cat([most.probs, most.tail[:, None]], dim=1)
    room = high - low
    budget = (1.0 - low.sum(-1)).clamp_min(0.0)

    # Data processing: merging the tail into one bucket cannot lower the overlap.
    q_upper = torch.cat([q, q_tail[:, None]], dim=1)
    base = torch.minimum(low, q_upper).sum(-1)
    gain = torch.minimum(high, q_upper).sum(-1) - base
    upper = base + torch.minimum(gain, budget)

    # The draft may have put all of its tail mass on tokens that the target never says.
    q_lower = torch.cat([q, torch.zeros_like(q_tail)[:, None]], dim=1)
    base = torch.minimum(low, q_lower)
    slope = ((torch.minimum(high, q_lower) - base) / room).where(room > 0, 0.0)
    slope, order = slope.sort(dim=-1)
    room = room.gather(1, order)
    taken = torch.minimum((budget[:, None] - (room.cumsum(-1) - room)).clamp_min(0.0), room)
    lower = base.sum(-1) + (taken * slope).sum(-1)
    return (lower - BOUND_SLACK).clamp(0.0, 1.0), (upper + BOUND_SLACK).clamp(0.0, 1.0)


def cached_acceptance(
    draft: PreTrainedModel,
    store: Store,
    *,
    batch_tokens: int = 8192,
    max_documents: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> CachedAcceptance:
    """Scores a draft against the stored rows of a store. The target is not needed.

    Args:
        draft: A causal LM over the store's vocabulary, where it should run; its logits are taken in float32.
        store: With a finished target layer.
        batch_tokens: Most tokens of a batch of documents, padding included; one document always fits.
        max_documents: Only the first so many documents; all by default.
        progress: Called with the number of documents done since its last call.

    Raises:
        ValueError: The draft's vocabulary is too small, its architecture cannot be split, or nothing is to be scored.
        LogitStoreError: The target layer is missing, unfinished or damaged.
    """
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens must be at least 1, got batch_tokens={batch_tokens}; 8192 is usual")
    if max_documents is not None and max_documents < 1:
        raise ValueError(f"max_documents must be at least 1, got max_documents={max_documents}; leave it out for all")
    if store.spec.target is None:
        raise LayerNotFoundError(f"store must have a target layer, got store={store.url}; dump the target first")
    check_vocabulary(model_spec(str(draft.name_or_path), draft.config, "auto"), store.spec.tokenizer, "draft")
    lm = SplitLM(draft, store.spec.tokenizer.vocab_size)
    training = draft.training
    draft.eval()
    sums = dict.fromkeys((f.name for f in fields(RowAcceptance)), 0.0)
    num_documents = num_rows = 0
    try:
        lm.check()
        for index in range(store.num_shards):
            left = None if max_documents is None else max_documents - num_documents
            if left == 0:
                break
            scored = _ShardScorer(lm, store, index)
            num_documents += len(scored.shard.lengths[:left])
            for batch in batches(scored.shard, batch_tokens, left):
                for part in scored.score(batch):
                    num_rows += len(part.alpha_lower)
                    totals = torch.stack([getattr(part, name) for name in sums]).sum(-1).tolist()
                    sums = {name: old + new for (name, old), new in zip(sums.items(), totals, strict=True)}
                if progress is not None:
                    progress(len(batch.ids))
    finally:
        draft.train(training)
    if not num_rows:
        raise ValueError(
            f"store must have rows with loss mask 1, got store={store.url} with none in {num_documents} documents; "
            "give a larger max_documents or another store"
        )
    means = {name: total / num_rows for name, total in sums.items()}
    return CachedAcceptance(documents=num_documents, rows=num_rows, **means)


class _ShardScorer:
    """One shard and a draft."""

    def __init__(self, lm: SplitLM, store: Store, index: int) -> None:
        self._lm = lm
        stored = store.read_stored(index, layers=("target",))
        self.shard = store.assemble(stored)
        arrays = stored["target"].arrays
        target = store.spec.target
        self._kept_from = math.inf
        if target is not None and target.scheme.name == "hybrid":
            self._kept_from = float(np.float32(target.step)) * (1 - 1e-6)
        self._rows = (views.decode(store, arrays), *views.decode_bounds(store, arrays))

    @torch.no_grad()
    def score(self, batch: Batch) -> Iterator[RowAcceptance]:
        """Scores the rows of a batch that count, a chunk of rows at a time."""
        device = self._lm.device
        hidden = self._lm.hidden(torch.from_numpy(batch.ids).to(device)).flatten(0, 1)
        hidden = hidden[torch.from_numpy(batch.places).to(device)]
        for start in range(0, len(hidden), self._lm.rows_per_chunk):
            chunk = slice(start, start + self._lm.rows_per_chunk)
            logprobs = normalised(self._lm.logits(hidden[chunk]))
            rows = batch.rows[chunk]
            stored, least, most = (Support.of(part.padded(rows), device) for part in self._rows)
            yield row_acceptance(logprobs, stored, least, most, self._kept_from)
