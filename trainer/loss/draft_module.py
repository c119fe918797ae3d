"""DraftModule: a draft whose forward pass is the loss of a micro-batch: what data-parallel wrappers wrap.

N rows, K entries per row at most, B packs, T tokens of the longest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from logitstore.models.split_lm import SplitLM
from logitstore.models.support import Support
from trainer.loss.fused_head import RowLosses, look_at_rows, train_rows
from trainer.loss.selection import Candidates, Chosen, choose

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from trainer.loss.objectives import Objective
    from trainer.loss.selection import Rule


class DraftModule(nn.Module):
    """A draft with what it is trained on.

    Attributes:
        draft: The Hugging Face model; its vocabulary keeps its padding.
        split: It, as a backbone and a head.
        objective: What is minimised at each row that counts.
        rule: Which rows those are.
    """

    def __init__(self, draft: PreTrainedModel, *, vocab_size: int, objective: Objective, rule: Rule) -> None:
        super().__init__()
        self.draft = draft
        self.split = SplitLM(draft, vocab_size)
        self.objective = objective
        self.rule = rule

    def forward(
        self,
        input_ids: Tensor,
        rows: Tensor,
        labels: Tensor,
        documents: Tensor,
        position_ids: Tensor | None = None,
        token_ids: Tensor | None = None,
        probs: Tensor | None = None,
        tail: Tensor | None = None,
        weights: Tensor | None = None,
        entropy: Tensor | None = None,
        columns: dict[str, Tensor] | None = None,
        scores: Tensor | None = None,
        others: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Computes the loss of one micro-batch, laid out by `trainer.data.collate.Collator`.

        Args:
            input_ids: Int64 [B, T].
            rows: Int64 [N], where each row whose loss mask is 1 is in the flattened [B * T].
            labels: Int64 [N], the token that follows each.
            documents: Int64 [N], the number of each row's document, from 0 and rising.
            position_ids: Int64 [B, T], where packs hold several documents.
            token_ids: Int64 [N, K], entries of the target; None without a target, as are the next four.
            probs: Float32 [N, K].
            tail: Float32 [N].
            weights: Float32 [N, K], only where entries were drawn, as is `entropy`.
            entropy: Float32 [N].
            columns: Float32 [N] each: what the selection reads of the store.
            scores: Float32 [N], where they are known already.
            others: Float32: scores of other rows that these compete with.

        Returns:
            loss: Scalar, with gradient: the weighted sum over the rows that count. All else is without gradient.
            scores: Float32 [N], of rows that were scored here; empty otherwise.
            And float32 scalars to be summed over micro-batches: see `_statistics` and `_of_known`.
        """
        hidden = self.split.hidden(input_ids, position_ids).flatten(0, 1).index_select(0, rows)
        support = _support(token_ids, probs, tail, weights, entropy)
        seen, is_known = None, scores is not None and bool(self.rule.selection.looks)
        if scores is None and self.rule.selection.selects:
            scores, seen = self._score(hidden.detach(), support, labels, columns or {})
        if scores is None:
            every = torch.ones(len(labels), device=hidden.device)
            chosen = Chosen(weights=every, kept=every > 0, threshold=every.new_tensor(torch.nan))
        else:
            chosen = choose(self.rule, scores, documents, others)
        (places,) = chosen.weights.nonzero(as_tuple=True)
        if len(places) < len(labels):
            hidden, labels = hidden.index_select(0, places), labels[places]
            support = None if support is None else support[places]
        trained = chosen.weights[places]
        loss, losses = train_rows(self.split, hidden, support, labels, trained, self.objective)
        nothing = torch.zeros(0, device=hidden.device)
        return {
            "loss": loss,
            "scores": nothing if scores is None else scores,
            **_statistics(chosen, scores, losses, trained),
            **({} if is_known else _of_known(losses if seen is None else seen)),
        }

    @torch.no_grad()
    def scores(
        self,
        input_ids: Tensor,
        rows: Tensor,
        labels: Tensor,
        **batch: Any,  # noqa: ANN401
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the scores of a micro-batch, float32 [N], from the arguments of `forward`.

        Returns:
            The scores; and what `forward` says of rows that it looks at, which it will not say again when it is given
            these scores.
        """
        support = _support(*(batch.get(name) for name in ("token_ids", "probs", "tail", "weights", "entropy")))
        hidden = input_ids.new_zeros(0)
        if self.rule.selection.looks:
            hidden = self.split.hidden(input_ids, batch.get("position_ids")).flatten(0, 1).index_select(0, rows)
        scores, seen = self._score(hidden, support, labels, batch.get("columns") or {})
        return scores, {} if seen is None else _of_known(seen)

    def _score(
        self, hidden: Tensor, support: Support | None, labels: Tensor, columns: dict[str, Tensor]
    ) -> tuple[Tensor, RowLosses | None]:
        """Returns the scores of N rows, and their losses where the draft was looked at."""
        selection = self.rule.selection
        if selection.score is None:
            raise ValueError("selection must score rows to be asked for scores, got one that keeps all")
        values, seen = dict(columns), None
        if selection.looks:
            found, seen = look_at_rows(self.split, hidden, support, labels, selection.looks)
            values |= found
        return selection.score(Candidates(support=support, values=values)).float(), seen

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Turns on activation checkpointing of the draft's layers, as Trainer asks for it."""
        self.draft.activation_checkpointing_enable(
            activation_checkpointing_kwargs=activation_checkpointing_kwargs,
            every_n_layers=every_n_layers,
            offload=offload,
        )


def _support(
    token_ids: Tensor | None, probs: Tensor | None, tail: Tensor | None, weights: Tensor | None, entropy: Tensor | None
) -> Support | None:
    if token_ids is None or probs is None or tail is None:
        return None
    return Support(token_ids=token_ids, probs=probs, tail=tail, weights=weights, drawn_entropy=entropy)


def _of_known(known: RowLosses) -> dict[str, Tensor]:
    """Returns the number of rows whose losses are known, and sums over them: of the text's nats, KL(p‖draft), alpha.

    They are all rows, where the selection looked at the draft, else those trained on.
    """
    found = {"known": known.label_nll.new_tensor(len(known.label_nll)), "label_nll": known.label_nll.sum()}
    if known.kl is not None and known.alpha is not None:
        found |= {"kl": known.kl.sum(), "alpha": known.alpha.sum()}
    return found


def _statistics(chosen: Chosen, scores: Tensor | None, trained: RowLosses, weights: Tensor) -> dict[str, Tensor]:
    """Returns what is logged, as float32 scalars that may be summed over micro-batches and ranks.

    rows, kept, weight, objective: numbers of rows, of those kept, the sum of the weights, that of the losses.
    kept_kl, trained: the sum of KL(p‖draft) over the rows trained on, and their number.
    scored, score, score_squared, score_kept: the number of scores, their sum, that of their squares, and of the kept.
    threshold, thresholds: the sum of thresholds that there are, and their number.
    """
    found = {
        "rows": chosen.weights.new_tensor(len(chosen.weights)),
        "kept": chosen.kept.sum().float(),
        "weight": chosen.weights.sum(),
        "objective": (trained.objective * weights).sum(),
        "trained": chosen.weights.new_tensor(len(trained.label_nll)),
    }
    if trained.kl is not None:
        found["kept_kl"] = trained.kl.sum()
    if scores is not None:
        found |= {
            "scored": chosen.weights.new_tensor(len(scores)),
            # of scores that are nearly equal the squares' sum in float32 would leave no spread
            "score": scores.double().sum(),
            "score_squared": scores.double().square().sum(),
            "score_kept": scores[chosen.kept].sum(),
            "threshold": chosen.threshold.nan_to_num(),
            "thresholds": chosen.threshold.isfinite().float(),
        }
    return found
