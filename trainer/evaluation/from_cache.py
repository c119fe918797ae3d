"""Acceptance rate of a draft from the cache: teacher-forced, on the stored rows, without the target.

How often a target accepts the draft's token after *its own documents'* text; what a served model accepts after text
that it wrote itself is measured by `trainer.evaluation.speculative`. N rows, K entries per row at most, V vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from logitstore.errors import LayerNotFoundError
from logitstore.models.identity import check_vocabulary, model_spec
from logitstore.models.probes import check_halves
from logitstore.models.split_lm import SplitLM
from logitstore.models.support import Support, acceptance_estimate, estimated_cross_entropy, normalised, on_support
from logitstore.rows.batches import batches
from logitstore.rows.rows import Rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedModel

    from logitstore import Store
    from logitstore.rows.batches import Batch
    from logitstore.rows.shard import Shard

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


COMPARED = tuple(field.name for field in fields(RowAcceptance))


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
        forward_kl=estimated_cross_entropy(stored, kept, log_tail) - stored.entropy(),
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


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredDocuments:
    """Documents of a shard, and all that is stored of the target at their rows."""

    shard: Shard
    """These documents alone."""
    bounds: tuple[Rows, Rows] | None
    """Their rows at the least and at the most that their codes allow; None where the target was not read."""
    kept_from: float
    """The probability from which on tokens are kept without being drawn."""

    @property
    def nbytes(self) -> int:
        """Memory that they take."""
        parts = [part for part in (self.shard.rows, *(self.bounds or ())) if part is not None]
        values = [self.shard.ids, self.shard.loss_mask, *(value for part in parts for value in vars(part).values())]
        return sum(value.nbytes for value in values if value is not None)

    def chosen(self, places: NDArray[np.intp]) -> StoredDocuments:
        """Returns a copy of some of the documents, at least one, by their places among these."""
        shard = self.shard
        spans = [(int(shard.starts[place]), int(shard.starts[place + 1])) for place in places]
        kept = np.concatenate([np.arange(*span) for span in spans])
        return StoredDocuments(
            shard=replace(
                shard,
                ids=shard.ids[kept],
                loss_mask=shard.loss_mask[kept],
                lengths=shard.lengths[places],
                rows=None if shard.rows is None else _spans(shard.rows, spans),
            ),
            bounds=None if self.bounds is None else (_spans(self.bounds[0], spans), _spans(self.bounds[1], spans)),
            kept_from=self.kept_from,
        )


def _spans(rows: Rows, spans: list[tuple[int, int]]) -> Rows:
    return Rows.concatenate([rows.slice(*span) for span in spans])


def read_documents(store: Store, index: int, *, reads_target: bool = True) -> StoredDocuments:
    """Reads the documents of a shard, to be compared with a draft.

    Args:
        store: Read by any scheme.
        index: Of the shard.
        reads_target: Whether the target's rows are read.

    Raises:
        LogitStoreError: A layer is missing, unfinished or damaged.
    """
    stored = store.reader.read_layers(index, layers=("target",) if reads_target else ())
    target, kept_from = store.spec.target, math.inf
    if target is not None and target.scheme.name == "hybrid":
        kept_from = float(np.float32(target.step)) * (1 - 1e-6)
    return StoredDocuments(
        shard=store.reader.assemble(stored),
        bounds=store.reader.decode_bounds(stored["target"].arrays) if reads_target else None,
        kept_from=kept_from,
    )


@torch.no_grad()
def batch_sums(lm: SplitLM, documents: StoredDocuments, batch: Batch) -> dict[str, float]:
    """Compares a draft with the rows of a batch that count, a chunk of them at a time.

    Args:
        lm: The draft, in the mode that it should run in.
        documents: What is stored of them.
        batch: Some of these, laid out.

    Returns:
        The number of `rows`; over them the sums of label_nll, minus the draft's logprob of the token that follows, and
        where the target was read those of RowAcceptance. Float64 sums of float32 values.
    """
    device = lm.device
    hidden = lm.hidden(torch.from_numpy(batch.ids).to(device)).flatten(0, 1)
    hidden = hidden[torch.from_numpy(batch.places).to(device)]
    labels = torch.from_numpy(batch.labels).to(device)
    sums: Counter[str] = Counter()
    for start in range(0, len(hidden), lm.rows_per_chunk):
        chunk = slice(start, start + lm.rows_per_chunk)
        logprobs = normalised(lm.logits(hidden[chunk]))
        values = {"label_nll": -logprobs.gather(1, labels[chunk, None])[:, 0]}
        if documents.shard.rows is not None and documents.bounds is not None:
            rows = batch.rows[chunk]
            parts = (Support.of(part.padded(rows), device) for part in (documents.shard.rows, *documents.bounds))
            stored, least, most = parts
            compared = row_acceptance(logprobs, stored, least, most, documents.kept_from)
            values |= {name: getattr(compared, name) for name in COMPARED}
        totals = torch.stack(list(values.values())).cpu().double().sum(-1)
        sums.update(dict(zip(values, totals.tolist(), strict=True)))
    return {"rows": float(len(hidden)), **sums}


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
    wanted = store.num_documents if max_documents is None else min(max_documents, store.num_documents)
    last, place = store.locate(wanted - 1) if wanted else (-1, -1)
    sums: Counter[str] = Counter()
    with evaluating(draft):
        check_halves(lm)
        for index in range(last + 1):
            documents = read_documents(store, index)
            if index == last and max_documents is not None:
                documents = documents.chosen(np.arange(place + 1))
            for batch in batches(documents.shard, batch_tokens):
                sums.update(batch_sums(lm, documents, batch))
                if progress is not None:
                    progress(len(batch.ids))
    if not sums["rows"]:
        raise ValueError(
            f"store must have rows with loss mask 1, got store={store.url} with none in {wanted} documents; "
            "give a larger max_documents or another store"
        )
    means = {name: sums[name] / sums["rows"] for name in COMPARED}
    return CachedAcceptance(documents=wanted, rows=int(sums["rows"]), **means)


@contextmanager
def evaluating(draft: PreTrainedModel) -> Iterator[None]:
    """Has a draft run without dropout for the while, and in its own mode afterwards."""
    training = draft.training
    draft.eval()
    try:
        yield
    finally:
        draft.train(training)
