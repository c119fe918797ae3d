"""Acceptance rate of a draft, computed from the cached target rows. The target itself is not needed.

The measurement is teacher-forced: both models predict each token from the *document's* text before it. In service, the
target instead continues text that it wrote itself; `trainer.evaluation.speculative` measures acceptance on such text.

A store keeps each logprob rounded, as a code. One code therefore stands for a range of probabilities.

Shapes: N rows, at most K entries per row, V tokens in the vocabulary.
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
"""Amount by which both bounds of alpha are widened. It is larger than the float32 rounding errors of the dump
and of this module."""


@dataclass(frozen=True, kw_only=True)
class CachedAcceptance:
    """Averages over the rows of a store with loss mask 1. The context of each row is the text of a document."""

    documents: int
    """Number of documents read."""
    rows: int
    """Number of rows with loss mask 1 in these documents."""
    alpha_lower: float
    """Lower bound of the mean of alpha = sum_v min(p_v, q_v), where p is the target and q the draft. The bound counts
    the kept entries only. Among all probabilities that the stored codes stand for, it assumes those that make alpha
    smallest."""
    alpha_upper: float
    """Upper bound of the mean of alpha. The bound treats all tokens without an entry (the tail) as one token. Among all
    probabilities that the stored codes stand for, it assumes those that make alpha largest."""
    alpha_estimate: float
    """Point estimate of the mean of alpha, from the decoded probabilities.

    Truncated rows: sum_S min(p, q) + min(p_t, q_t), where S are the kept entries and p_t, q_t the tail masses. Rounding
    to codes makes the estimate up to 0.005 too low where q = p. Treating the tail as one token makes it too high.
    Drawn rows: sum_S w min(1, q / p), where w are the weights of the entries. This is unbiased, except for the
    rounding to codes."""
    argmax_agreement: float
    """Share of rows where the draft's likeliest token equals the likeliest kept token. If the likeliest kept token is
    the target's likeliest token in every row, this share is the acceptance rate of greedy decoding; see
    `argmax_known`."""
    argmax_known: float
    """Share of rows whose entries certainly include the target's likeliest token. It is 1 for truncated rows; the draws
    of a drawn row may miss that token."""
    forward_kl: float
    """Mean of KL(p‖q) in nats, where p is the target and q the draft. Truncated rows: computed over the kept entries,
    with the tail as one more token. Drawn rows: an unbiased estimate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowAcceptance:
    """Values of N rows, float32 [N] each. The mean of a field is the field of `CachedAcceptance` with the same name."""

    alpha_lower: Tensor
    alpha_upper: Tensor
    alpha_estimate: Tensor
    argmax_agreement: Tensor
    argmax_known: Tensor
    forward_kl: Tensor


COMPARED = tuple(field.name for field in fields(RowAcceptance))
"""Names of the per-row values, in the order of the fields of `RowAcceptance`."""


def expected_tokens_per_call(alpha: float, gamma: int) -> float:
    """Predicts the tokens per target call, under the assumption that drafted tokens are accepted independently.

    The prediction is (1 - alpha^(gamma + 1)) / (1 - alpha), and gamma + 1 at alpha = 1. In real text, whether a
    token is accepted depends on the tokens before it, so a measured value differs.

    Args:
        alpha: Acceptance rate of one drafted token, in [0, 1].
        gamma: Number of tokens drafted per target call.
    """
    return sum(alpha**i for i in range(gamma + 1))


def row_acceptance(
    logprobs: Tensor,
    stored: Support,
    least: Support,
    most: Support,
    kept_from: float = math.inf,
) -> RowAcceptance:
    """Compares the draft's distribution with the stored distribution of each row.

    Args:
        logprobs: Float32 [N, V], logprobs of the draft, normalised over the true vocabulary.
        stored: The N decoded rows.
        least: The entries of `stored`, each with the lowest probability that its code can stand for.
        most: The entries of `stored`, each with the highest probability that its code can stand for.
        kept_from: Tokens with at least this probability are always kept and never drawn; inf if the scheme of the
            store has no such limit.

    Returns:
        The acceptance figures of the N rows, among them the bounds alpha_lower and alpha_upper. For every target
        distribution p that agrees with the codes, sum_v min(p_v, q_v) lies between these bounds. Here, q is the
        distribution of the draft.
    """
    kept, log_tail = on_support(logprobs, stored)
    q, q_tail = kept.exp().where(stored.used, 0.0), log_tail.exp()
    lower, upper = _alpha_bounds(least, most, q, q_tail)
    highest, place = stored.probs.max(-1, keepdim=True)
    likeliest = stored.token_ids.gather(1, place)[:, 0]
    is_known = torch.ones_like(lower)
    if stored.weights is not None:
        # A token without an entry has at most the probability of the tail, and a probability below `kept_from`.
        at_least = least.probs.gather(1, place)[:, 0]
        # If two entries share the highest probability, either of them may be the target's likeliest token.
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
    """Returns bounds of sum_v min(p_v, q_v) over all p between `least` and `most` that sum to 1; float32 [N] each.

    Every entry of p starts at its least value. The mass that is then missing for a sum of 1, called the budget, is
    distributed over the entries. For the upper bound, the budget goes first to entries where it raises min(p, q). For
    the lower bound, it goes first to the entries where it raises min(p, q) least. As a function of p, min(p, q) is
    concave, so its chord from least to most lies below the function. The lower bound follows the chords in the order of
    their slopes, smallest first.
    """
    low = torch.cat([least.probs, least.tail[:, None]], dim=1)
    high = torch.cat([most.probs, most.tail[:, None]], dim=1)
    room = high - low
    budget = (1.0 - low.sum(-1)).clamp_min(0.0)

    # Data processing inequality: merging the tail into one bucket cannot lower sum_v min(p_v, q_v).
    q_upper = torch.cat([q, q_tail[:, None]], dim=1)
    base = torch.minimum(low, q_upper).sum(-1)
    gain = torch.minimum(high, q_upper).sum(-1) - base
    upper = base + torch.minimum(gain, budget)

    # In the worst case, the draft's whole tail mass is on tokens that have no probability under the target.
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
    """Some documents of a shard, with the target's stored distributions at the rows of these documents."""

    shard: Shard
    """The tokens, loss mask and decoded rows of these documents only."""
    bounds: tuple[Rows, Rows] | None
    """Two copies of the rows: one with the lowest and one with the highest probabilities that the codes stand for. None
    if the target was not read."""
    kept_from: float
    """Tokens with at least this probability are always kept and never drawn; inf if the scheme is not `hybrid`."""

    @property
    def nbytes(self) -> int:
        """Size of the arrays in memory, in bytes."""
        parts = [part for part in (self.shard.rows, *(self.bounds or ())) if part is not None]
        values = [self.shard.ids, self.shard.loss_mask, *(value for part in parts for value in vars(part).values())]
        return sum(value.nbytes for value in values if value is not None)

    def chosen(self, places: NDArray[np.intp]) -> StoredDocuments:
        """Returns a copy that holds only some of the documents.

        Args:
            places: Positions, within this object, of the documents to keep; at least one.
        """
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
    """Reads the documents of a shard for a comparison with a draft.

    Args:
        store: The open store; its target may have been dumped with any scheme.
        index: Number of the shard.
        reads_target: Whether to read the target's rows.

    Raises:
        LogitStoreError: A layer is missing, unfinished or damaged.
    """
    stored = store.reader.read_layers(index, layers=("target",) if reads_target else ())
    target, kept_from = store.spec.target, math.inf
    if target is not None and target.scheme.name == "hybrid":
        # The limit is slightly below the step, so that rounding does not exclude a probability exactly at the step.
        kept_from = float(np.float32(target.step)) * (1 - 1e-6)
    return StoredDocuments(
        shard=store.reader.assemble(stored),
        bounds=store.reader.decode_bounds(stored["target"].arrays) if reads_target else None,
        kept_from=kept_from,
    )


@torch.no_grad()
def batch_sums(lm: SplitLM, documents: StoredDocuments, batch: Batch) -> dict[str, float]:
    """Compares a draft with the stored rows of a batch, and returns sums over the rows with loss mask 1.

    The head runs on one chunk of rows at a time, so the logits of the whole batch are never in memory at once.

    Args:
        lm: The draft, already switched to evaluation mode.
        documents: The stored documents and target rows.
        batch: A padded batch of some of these documents.

    Returns:
        `rows`: the number of rows. `label_nll`: the sum of -log q of the token that follows each row, in nats. If the
        target was read, also the sum of each field of `RowAcceptance`. Float32 values are summed in float64.
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
        # The values are stacked, so that one transfer brings all of them to the CPU.
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
    """Measures the acceptance rate of a draft on the stored rows of a store. The target is not needed.

    Args:
        draft: A causal LM over the store's vocabulary, already on its device. Its logits are computed in float32.
        store: A store with a finished target layer.
        batch_tokens: Maximum number of tokens in a batch, padding included. A longer document is a batch by itself.
        max_documents: Maximum number of documents to read, beginning with the store's first one; None reads all.
        progress: Called after each batch with the number of documents in that batch.

    Raises:
        ValueError: The draft's vocabulary is too small, its architecture cannot be split into backbone and head, or
            no document has a row with loss mask 1.
        LogitStoreError: The target layer is missing, unfinished or damaged.
    """
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens must be at least 1, got batch_tokens={batch_tokens}; 8192 is usual")
    if max_documents is not None and max_documents < 1:
        raise ValueError(f"max_documents must be at least 1, got max_documents={max_documents}; omit it to read all")
    if store.spec.target is None:
        raise LayerNotFoundError(f"store must have a target layer, got store={store.url}; dump the target first")
    check_vocabulary(model_spec(str(draft.name_or_path), draft.config, "auto"), store.spec.tokenizer, "draft")
    lm = SplitLM(draft, store.spec.tokenizer.vocab_size)
    wanted = store.num_documents if max_documents is None else min(max_documents, store.num_documents)
    last, place = store.locate(wanted - 1) if wanted else (-1, -1)
    sums: Counter[str] = Counter()
    with evaluating(draft):
        check_halves(lm)
        # The last shard that is read may hold more documents than are wanted.
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
    """Context manager that switches a draft to evaluation mode (no dropout), and restores its mode at the end."""
    training = draft.training
    draft.eval()
    try:
        yield
    finally:
        draft.train(training)
