"""Selection of the rows to train on: a score of each row, and a rule that turns scores into weights.

A selection is a function from N candidate rows to N scores, together with a list of the values that the function
needs. The scope is the set of rows whose scores are compared with each other: the rows with the highest scores are
kept.
docs/selections.md shows how to add a selection.

This module uses torch only and holds no state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast, get_args

import torch

from logitstore.errors import nearest

if TYPE_CHECKING:
    from torch import Tensor

    from logitstore.format.spec import TargetSpec
    from logitstore.models.support import Support

Scope = Literal["document", "micro_batch", "step", "queue"]
SCOPES: tuple[str, ...] = get_args(Scope)
"""Names of the scopes, which are sets of rows whose scores are compared with each other. `document`: the rows of one
document (SE-KD). `micro_batch`: the rows of a micro-batch on one rank (AdaSPEC). `step`: the rows of an optimizer step
on all ranks. `queue`: the rows of a micro-batch and recent rows before them (selective KD for NMT)."""

ACCEPTED_TOP = 5
"""Number k in the gate of SpecKD. A row passes the gate if the draft's likeliest token is one of the target's k
likeliest tokens."""

COLUMNS = ("random", "reference_ce", "initial_ce", "target_entropy")
"""Names of the float32 values that the dataset provides for each row. `reference_ce` is the soft cross entropy of the
reference model, and `initial_ce` is that of the draft before training, both in nats. `target_entropy` is the entropy of
the target, in nats. `random` is a number in [0, 1) that depends only on the seed, the epoch and the row."""
TARGET = "target"
"""Name that stands for the target's rows in `Selection.needs`."""
LOOKS = ("draft_ce", "draft_label_nll", "draft_entropy", "draft_likeliest")
"""Names of the values that are computed from the draft for each row during training, without a gradient. `draft_ce` is
the draft's soft cross entropy, `draft_label_nll` is minus the draft's logprob of the label (the token that follows),
and `draft_entropy` is the draft's entropy. These three are float32, in nats. `draft_likeliest` is the id of the draft's
likeliest token, int64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """N rows whose loss mask is 1, with the values that a selection needs to score them."""

    support: Support | None
    """The target's rows; None if the target is not read."""
    values: Mapping[str, Tensor]
    """Values that the selection needs, [N] each, keyed by their names in COLUMNS and LOOKS."""

    def __getitem__(self, name: str) -> Tensor:
        return self.values[name]


Score = Callable[[Candidates], "Tensor"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """A function that scores rows, together with the names of the values that the function needs."""

    score: Score | None
    """Function from N candidates to scores, float32 [N]; None keeps every row."""
    needs: tuple[str, ...] = ()
    """Names from COLUMNS and LOOKS of the values that `score` uses, and TARGET if `score` uses the target's rows."""
    least: float | None = None
    """Lowest score that a gate keeps; None if the selection is not a gate. A gate is a selection that compares each
    score with this fixed value and ignores `Rule.keep` and the scope."""
    scope: Scope = "micro_batch"
    """Scope that is used if the caller of `make_rule` gives none."""

    @property
    def selects(self) -> bool:
        """Whether the selection scores rows, and so may leave some out."""
        return self.score is not None

    @property
    def competes(self) -> bool:
        """Whether a fixed fraction of the rows is kept. False if every row is kept, or if the selection is a gate."""
        return self.selects and self.least is None

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that the selection needs from the dataset."""
        return tuple(name for name in self.needs if name in COLUMNS)

    @property
    def looks(self) -> tuple[str, ...]:
        """Values that the selection needs from the draft."""
        return tuple(name for name in self.needs if name in LOOKS)

    @property
    def reads_target(self) -> bool:
        """Whether the scores need the target's rows."""
        # The draft's soft cross entropy and the gate on its likeliest token are computed against the target's entries.
        return not {TARGET, "draft_ce", "draft_likeliest"}.isdisjoint(self.needs)

    def check(self, target: TargetSpec | None, name: str) -> None:
        """Raises ValueError if this selection cannot score the rows of a store.

        Args:
            target: Spec of the store's target; None for a store without target rows.
            name: Name of this selection, for the message.
        """
        if target is None and not {*self.needs} <= {"random", "draft_label_nll", "draft_entropy"}:
            raise ValueError(
                f"selection {name} needs target rows, got selection={name} with a store that has none; dump the target "
                "first, or give all, random, label_nll or draft_entropy"
            )
        if "draft_likeliest" in self.needs and target is not None and target.scheme.name == "sample":
            raise ValueError(
                f"selection {name} needs the target's likeliest tokens, got selection={name} with scheme=sample, whose "
                "rows may lack these tokens; dump with --scheme hybrid or topk"
            )


def score_random(candidates: Candidates) -> Tensor:
    """Returns random scores, a baseline for other selections. They depend only on the seed, the epoch and the row."""
    return candidates["random"]


def score_gap(candidates: Candidates) -> Tensor:
    """Returns the loss gap CE(p, draft) - CE(p, reference) (AdaSPEC, arXiv 2510.19779, eqs. 7-9).

    CE(p, q) is the cross entropy between the target p and a model q. A large gap marks a row that the reference model
    predicts much better than the draft does, so the draft can still learn this row.
    """
    return candidates["draft_ce"] - candidates["reference_ce"]


def score_gap_bottom(candidates: Candidates) -> Tensor:
    """Returns minus the loss gap, so that the rows with the smallest gaps are kept (an ablation in AdaSPEC)."""
    return -score_gap(candidates)


def score_gap_static(candidates: Candidates) -> Tensor:
    """Returns the loss gap before training: the draft's stored loss minus the reference model's stored loss.

    This score needs no forward pass of the draft's head, and it is the same in every epoch.
    """
    return candidates["initial_ce"] - candidates["reference_ce"]


def score_draft_entropy(candidates: Candidates) -> Tensor:
    """Returns the draft's entropy. SE-KD (arXiv 2602.01395) keeps the highest 20 % of each document."""
    return candidates["draft_entropy"]


def score_target_entropy(candidates: Candidates) -> Tensor:
    """Returns the target's entropy, read from the store."""
    return candidates["target_entropy"]


def score_label_nll(candidates: Candidates) -> Tensor:
    """Returns minus the draft's logprob of the label (selective KD for NMT, arXiv 2105.12967).

    The paper keeps half of the rows, either of the micro-batch or of a queue of 30,000 rows.
    """
    return candidates["draft_label_nll"]


def score_accepted(candidates: Candidates) -> Tensor:
    """Returns 1 where the draft's likeliest token is among the target's five likeliest, else 0: the gate of SpecKD.

    Implements the greedy top-k gate of SpecKD / SelecTKD (arXiv 2510.24021). If the draft's token is
    not stored, the row gets the score 0. Rows of scheme `nucleus` may hold fewer than five entries. Rows of scheme
    `hybrid` hold a token with a probability below 1 / num_draws only if it was drawn.
    """
    support = candidates.support
    if support is None:
        raise ValueError("store must have target rows for selection=accepted, got none; dump the target first")
    hit = support.used & (support.token_ids == candidates["draft_likeliest"][:, None])
    p = (support.probs * hit).sum(-1, keepdim=True)
    # The rank is the number of stored entries that are likelier than the draft's token.
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
"""Selections, keyed by the names that --selection accepts."""


def quantile(scores: Tensor, keep: float) -> Tensor:
    """Returns the (1 - keep) quantile of scores, linearly interpolated.

    AdaSPEC's released code uses this quantile as the threshold that scores must reach.

    Args:
        scores: Float32 [N]; N may be 0.
        keep: Fraction of the scores to keep, in (0, 1].

    Returns:
        Float32 scalar; NaN if N is 0.
    """
    if not len(scores):
        return scores.new_tensor(torch.nan)
    # torch.quantile would return the same, but it accepts only a limited number of values.
    position = (1.0 - keep) * (len(scores) - 1)
    below = int(position)
    ordered = scores.sort().values
    low, high = ordered[below], ordered[min(below + 1, len(scores) - 1)]
    return torch.lerp(low, high, position - below)


def kept_of_documents(scores: Tensor, documents: Tensor, keep: float) -> Tensor:
    """Marks the ceil(keep * n) rows with the highest scores in each document of n rows.

    If rows have equal scores, earlier rows are kept first.

    Args:
        scores: Float32 [N].
        documents: Int64 [N], number of each row's document, counted from 0, in ascending order.
        keep: Fraction of the rows to keep, in (0, 1].

    Returns:
        Bool [N], true for the rows that are kept.
    """
    # Both sorts are stable, so that rows with equal scores stay in their order.
    order = scores.argsort(descending=True, stable=True)
    order = order[documents[order].argsort(stable=True)]  # document by document, highest score first
    sizes = torch.bincount(documents)
    starts = sizes.cumsum(0) - sizes
    rank = torch.arange(len(scores), device=scores.device) - starts[documents[order]]
    # The margin absorbs rounding: no float is exactly 0.2, but 0.2 of 10 rows must be 2 rows, not 3.
    kept = torch.empty(len(scores), dtype=torch.bool, device=scores.device)
    kept[order] = rank < (keep * sizes.double() - 1e-6).ceil()[documents[order]]
    return kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Rule that turns the scores of rows into their weights."""

    selection: Selection
    """Selection that scores the rows."""
    scope: Scope
    """Name of the scope, one of SCOPES."""
    keep: float
    """Fraction of the scope's rows that is kept, in (0, 1]."""
    outside_weight: float
    """Weight of the rows that are not kept, in [0, 1]; 0 leaves them out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """Result of applying a rule to N rows."""

    weights: Tensor
    """Float32 [N]: 1 for kept rows, `outside_weight` for the others."""
    kept: Tensor
    """Bool [N]: true for the rows that are kept."""
    threshold: Tensor
    """Float32 scalar for the log: rows whose score is at least this value are kept. NaN under the scope `document`,
    and if every row is kept without a score."""


def choose(rule: Rule, scores: Tensor, documents: Tensor, others: Tensor | None) -> Chosen:
    """Applies a rule to N rows: decides by their scores which rows are kept.

    Args:
        rule: Rule to apply.
        scores: Float32 [N].
        documents: Int64 [N], number of each row's document, counted from 0, in ascending order.
        others: Float32, 1-dimensional. Under the scope `step`: the scores of all rows of the optimizer step,
            including these N rows. Under the scope `queue`: the scores of recent rows. None under the other scopes.

    Returns:
        The weights of the rows, with the mask of kept rows and the threshold. If the selection is a gate, all rows
        whose score is at least the gate's value are kept. Otherwise, under the scope `document`, the ceil(keep * n)
        rows with the highest scores are kept in each document of n rows. Under every other scope, all rows whose score
        is at least the threshold are kept, ties included, as in AdaSPEC's released code.
    """
    nothing = scores.new_tensor(torch.nan)
    if rule.selection.least is not None:
        threshold = torch.full_like(nothing, rule.selection.least)
        # Here and below, `~ <` is used instead of `>=`: it keeps rows whose score is NaN, so that the loss shows NaN.
        kept = ~(scores < threshold)
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
    """Makes the rule for a selection.

    Args:
        name: Name of the selection, one of SELECTIONS.
        keep: Fraction of the scope's rows to keep, in (0, 1].
        scope: Name of the scope, one of SCOPES; None stands for the selection's default scope.
        outside_weight: Weight of the rows that are not kept, in [0, 1].

    Raises:
        ValueError: A name is unknown, or a number is out of its range.
    """
    if name not in SELECTIONS:
        raise ValueError(
            f"selection must be one of {list(SELECTIONS)}, got selection={name}{nearest(name, SELECTIONS)}"
        )
    if not 0.0 < keep <= 1.0:
        raise ValueError(f"keep must be above 0 and at most 1, got keep={keep}; 0.4 is usual")
    if not 0.0 <= outside_weight <= 1.0:
        raise ValueError(f"outside_weight must be between 0 and 1, got outside_weight={outside_weight}; 0 is usual")
    selection = SELECTIONS[name]
    if scope is not None and scope not in SCOPES:
        raise ValueError(f"scope must be one of {list(SCOPES)}, got scope={scope}; omit it for {selection.scope}")
    chosen = selection.scope if scope is None else cast("Scope", scope)
    return Rule(selection=selection, scope=chosen, keep=keep, outside_weight=outside_weight)
