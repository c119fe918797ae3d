"""Which rows count: a score of each row, and the rule that turns scores into weights. torch only; holds no state.

A selection is a function from N candidate rows to N scores, the largest first to be kept, and a line of what it needs
(docs/selections.md shows how to add one). Among which rows the scores compete is the scope.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast, get_args

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from logitstore.format.spec import TargetSpec
    from logitstore.models.support import Support

Scope = Literal["document", "micro_batch", "step", "queue"]
SCOPES: tuple[str, ...] = get_args(Scope)
"""Among which rows the fraction to keep is kept: those of a document (SE-KD); of a micro-batch on one rank (as AdaSPEC
was published); of all micro-batches and ranks of an optimizer step; or the recent ones (selective KD for NMT)."""


ACCEPTED_TOP = 5
"""How many of the target's likeliest tokens the gate of SpecKD lets pass."""

COLUMNS = ("random", "reference_ce", "initial_ce", "target_entropy")
"""What can be read of the store for each row, float32, nats: soft cross entropies of the reference and of the draft as
it was, the entropy of the target; or a number in [0, 1) that depends on the seed, the epoch and the row alone."""
TARGET = "target"
"""What a selection needs that looks at the target's rows."""
LOOKS = ("draft_ce", "draft_label_nll", "draft_entropy", "draft_likeliest")
"""What the draft can say of each row now, without gradient: its soft cross entropy, minus the logprob of the token that
follows, its entropy (float32, nats); its likeliest token (int64). Any of them costs a pass of the head."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """What a selection may look at: N rows whose loss mask is 1."""

    support: Support | None
    """The target's rows; None where the store has none."""
    values: Mapping[str, Tensor]
    """[N] each: those of COLUMNS and LOOKS that the selection needs."""

    def __getitem__(self, name: str) -> Tensor:
        return self.values[name]


Score = Callable[[Candidates], "Tensor"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """A selection and what it needs."""

    score: Score | None
    """From N candidates to float32 [N]; None keeps every row."""
    needs: tuple[str, ...] = ()
    """Of COLUMNS and LOOKS, or TARGET."""
    least: float | None = None
    """Rows that score as much are kept, whatever the fraction and the scope."""
    scope: Scope = "micro_batch"
    """Where nothing else is asked for."""

    @property
    def selects(self) -> bool:
        """Whether rows are left out."""
        return self.score is not None

    @property
    def competes(self) -> bool:
        """Whether rows compete for the fraction of a scope that is kept: no gate."""
        return self.selects and self.least is None

    @property
    def columns(self) -> tuple[str, ...]:
        """What is read of the store."""
        return tuple(name for name in self.needs if name in COLUMNS)

    @property
    def looks(self) -> tuple[str, ...]:
        """What the draft is asked for."""
        return tuple(name for name in self.needs if name in LOOKS)

    @property
    def reads_target(self) -> bool:
        """Whether scores need the target's distributions."""
        return not {TARGET, "draft_ce", "draft_likeliest"}.isdisjoint(self.needs)

    def check(self, target: TargetSpec | None, name: str) -> None:
        """Raises ValueError if rows of such a target cannot be selected from so; None is a store without one."""
        if target is None and not {*self.needs} <= {"random", "draft_label_nll", "draft_entropy"}:
            raise ValueError(
                f"selection must be one that needs no target where the store has no target rows, got selection={name}; "
                "dump the target first, or give all, random, label_nll or draft_entropy"
            )
        if "draft_likeliest" in self.needs and target is not None and target.scheme.name == "sample":
            raise ValueError(
                f"selection must be another where all entries were drawn, got selection={name} with "
                "scheme=sample: the target's likeliest tokens may be missing; dump with --scheme hybrid or topk"
            )


def score_random(candidates: Candidates) -> Tensor:
    """Scores at random: the control of every other selection. A row's number depends on seed and epoch alone."""
    return candidates["random"]


def score_gap(candidates: Candidates) -> Tensor:
    """Scores by the loss gap CE(p, draft) - CE(p, reference): what the reference shows the draft can still learn.

    AdaSPEC, arXiv 2510.19779, eqs. 7-9.
    """
    return candidates["draft_ce"] - candidates["reference_ce"]


def score_gap_bottom(candidates: Candidates) -> Tensor:
    """Scores by minus the loss gap: AdaSPEC's ablation."""
    return -score_gap(candidates)


def score_gap_static(candidates: Candidates) -> Tensor:
    """Scores by the loss gap of the draft as it was, from the store: no pass of the head, the same rows every epoch."""
    return candidates["initial_ce"] - candidates["reference_ce"]


def score_draft_entropy(candidates: Candidates) -> Tensor:
    """Scores by the draft's entropy (SE-KD, arXiv 2602.01395); published with a fraction of 0.2 of each document."""
    return candidates["draft_entropy"]


def score_target_entropy(candidates: Candidates) -> Tensor:
    """Scores by the target's entropy, from the store."""
    return candidates["target_entropy"]


def score_label_nll(candidates: Candidates) -> Tensor:
    """Scores by minus the draft's logprob of the label (selective KD for NMT, arXiv 2105.12967).

    Published with a fraction of 0.5 of the micro-batch, or with the scope queue, of 30,000 rows.
    """
    return candidates["draft_label_nll"]


def score_accepted(candidates: Candidates) -> Tensor:
    """Scores 1 where the draft's likeliest token is among the target's five likeliest, else 0: the gate of SpecKD.

    SpecKD / SelecTKD, arXiv 2510.24021, greedy top-k. A token that is not stored is not among them: rows of a nucleus
    may hold fewer than five, and of `hybrid` those below 1 / num_draws only if drawn.
    """
    support = candidates.support
    if support is None:
        raise ValueError("store must have target rows for selection=accepted, got none; dump the target first")
    hit = support.used & (support.token_ids == candidates["draft_likeliest"][:, None])
    p = (support.probs * hit).sum(-1, keepdim=True)
    rank = (support.probs > p).sum(-1)
    return (hit.any(-1) & (rank < ACCEPTED_TOP)).float()


SELECTIONS = {
    "all": Selection(score=None),
    "random": Selection(score=score_random, needs=("random",)),
    "adaspec": Selection(score=score_gap, needs=("draft_ce", "reference_ce")),
    "bottom_gap": Selection(score=score_gap_bottom, needs=("draft_ce", "reference_ce")),
    "static_gap": Selection(score=score_gap_static, needs=("initial_ce", "reference_ce")),
    "draft_entropy": Selection(score=score_draft_entropy, needs=("draft_entropy",), scope="document"),
    "target_entropy": Selection(score=score_target_entropy, needs=("target_entropy",)),
    "label_nll": Selection(score=score_label_nll, needs=("draft_label_nll",)),
    "accepted": Selection(score=score_accepted, needs=(TARGET, "draft_likeliest"), least=1.0),
}
"""By the name that --selection takes."""


def quantile(scores: Tensor, keep: float) -> Tensor:
    """Returns the (1 - keep) quantile of scores, linearly interpolated: the threshold of AdaSPEC's released code.

    Args:
        scores: Float32 [N], on one device; N may be 0.
        keep: In (0, 1].

    Returns:
        Float32 scalar, NaN where there are no scores.
    """
    if not len(scores):
        return scores.new_tensor(torch.nan)
    # torch.quantile, but for any number of scores
    position = (1.0 - keep) * (len(scores) - 1)
    below = int(position)
    ordered = scores.sort().values
    low, high = ordered[below], ordered[min(below + 1, len(scores) - 1)]
    return torch.lerp(low, high, position - below)


def kept_of_documents(scores: Tensor, documents: Tensor, keep: float) -> Tensor:
    """Keeps the ceil(keep n) highest scores of each document of n rows; of equal ones the first.

    Args:
        scores: Float32 [N].
        documents: Int64 [N]: the number of each row's document, from 0 and rising.
        keep: In (0, 1].

    Returns:
        Bool [N].
    """
    order = scores.argsort(descending=True, stable=True)
    order = order[documents[order].argsort(stable=True)]  # each document's rows together, best first
    sizes = torch.bincount(documents)
    starts = sizes.cumsum(0) - sizes
    rank = torch.arange(len(scores), device=scores.device) - starts[documents[order]]
    # a fraction that is not quite a float's must not keep one row more: 0.2 of 10 rows are 2
    kept = torch.empty(len(scores), dtype=torch.bool, device=scores.device)
    kept[order] = rank < (keep * sizes.double() - 1e-6).ceil()[documents[order]]
    return kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """How scores become weights."""

    selection: Selection
    scope: Scope
    keep: float
    """Fraction of the rows of the scope, in (0, 1]."""
    outside_weight: float
    """Of rows that are not kept; 0 leaves them out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """Which of N rows count, and what is logged of it."""

    weights: Tensor
    """Float32 [N]: 1 where kept, `outside_weight` elsewhere."""
    kept: Tensor
    """Bool [N]"""
    threshold: Tensor
    """Float32 scalar: the score that was to be reached; NaN where there is no such one."""


def choose(rule: Rule, scores: Tensor, documents: Tensor, others: Tensor | None) -> Chosen:
    """Chooses among N rows by their scores.

    Args:
        rule: How.
        scores: Float32 [N].
        documents: Int64 [N]: the number of each row's document, from 0 and rising.
        others: Float32: all scores of the optimizer step under the scope step, those of recent rows under queue.

    Returns:
        Rows whose score reaches the threshold, ties and all, as AdaSPEC's released code has it; of a document those
        with the ceil(keep n) highest scores.
    """
    nothing = scores.new_tensor(torch.nan)
    if rule.selection.least is not None:
        threshold = torch.full_like(nothing, rule.selection.least)
        kept = ~(scores < threshold)  # a score that is no number is kept, so that the loss shows it
    elif rule.scope == "document":
        threshold, kept = nothing, kept_of_documents(scores, documents, rule.keep)
    else:
        compared = scores
        if others is not None:
            compared = others if rule.scope == "step" else torch.cat([others, scores])
        threshold = quantile(compared, rule.keep)
        kept = ~(scores < threshold)
    weights = kept.float()
    if rule.outside_weight:
        weights = weights.where(kept, rule.outside_weight)
    return Chosen(weights=weights, kept=kept, threshold=threshold)


def make_rule(name: str, *, keep: float, scope: str | None = None, outside_weight: float = 0.0) -> Rule:
    """Makes the rule of a selection.

    Args:
        name: Of SELECTIONS.
        keep: Fraction of the rows to keep, in (0, 1].
        scope: Of SCOPES; None is the selection's own.
        outside_weight: Of rows that are not kept, in [0, 1].

    Raises:
        ValueError: One of them is out of its range.
    """
    if name not in SELECTIONS:
        raise ValueError(f"selection must be one of {list(SELECTIONS)}, got selection={name}")
    if not 0.0 < keep <= 1.0:
        raise ValueError(f"keep must be above 0 and at most 1, got keep={keep}; 0.4 is usual")
    if not 0.0 <= outside_weight <= 1.0:
        raise ValueError(f"outside_weight must be between 0 and 1, got outside_weight={outside_weight}; 0 is usual")
    selection = SELECTIONS[name]
    if scope is not None and scope not in SCOPES:
        raise ValueError(f"scope must be one of {list(SCOPES)}, got scope={scope}; leave it out for {selection.scope}")
    chosen = selection.scope if scope is None else cast("Scope", scope)
    return Rule(selection=selection, scope=chosen, keep=keep, outside_weight=outside_weight)
