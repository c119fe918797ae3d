"""DraftModule, whose forward pass computes the loss of a micro-batch. Data-parallel wrappers wrap this module.

In shapes, B is the number of packs, T the number of tokens in the longest pack, N the number of rows whose loss mask
is 1, and K the largest number of entries in a row.
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
    """Draft, together with the objective that is minimised and the rule that selects rows.

    Attributes:
        draft: The Hugging Face model, including the padding rows of its embeddings.
        split: The same model as a backbone and a head. The head returns logits of the true vocabulary only.
        objective: The loss that is minimised on the selected rows.
        rule: The rule that selects rows, by giving each row a weight.
    """

    def __init__(self, draft: PreTrainedModel, *, vocab_size: int, objective: Objective, rule: Rule) -> None:
        """Splits the draft into its backbone and its head.

        Args:
            draft: A causal LM that can be split; `logitstore.models.probes.check_halves` checks this.
            vocab_size: Size of the true vocabulary.
            objective: Loss to minimise.
            rule: Rule that selects rows.
        """
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
            rows: Int64 [N], indices into the flattened [B * T] tokens, one for each row whose loss mask is 1.
            labels: Int64 [N], id of the token that follows each row.
            documents: Int64 [N], number of each row's document, counted from 0, in ascending order.
            position_ids: Int64 [B, T], positions within documents; only if packs may hold several documents.
            token_ids: Int64 [N, K], token ids of the target's entries. Without a target, this argument and the four
                that follow are None.
            probs: Float32 [N, K], the target's probabilities of the entries. Rows with fewer than K entries are padded
                with 0.
            tail: Float32 [N], tail mass of the target.
            weights: Float32 [N, K], weights of the entries; only if entries were drawn.
            entropy: Float32 [N], entropy of the target in nats; only if entries were drawn.
            columns: Columns that the selection needs, float32 [N] each, keyed by name.
            scores: Float32 [N], scores of the rows from the method `scores`. If None, `forward` computes the
                scores that the selection needs.
            others: Float32, scores with which the scores of these N rows are compared; see
                `trainer.loss.selection.choose`.

        Returns:
            loss: Float32 scalar with gradient, in nats: the sum of the rows' losses times their weights. The values
                below have no gradient.
            scores: Float32 [N], scores of the rows; empty if the selection keeps every row.
            Scalars for the log, which may be summed over micro-batches: see `_statistics` and `_loss_sums`.
        """
        hidden = self.split.hidden(input_ids, position_ids).flatten(0, 1).index_select(0, rows)
        support = _support(token_ids, probs, tail, weights, entropy)
        # If scores are given and depend on the draft, the method `scores` has already returned the loss sums.
        all_losses, is_counted = None, scores is not None and bool(self.rule.selection.looks)
        if scores is None and self.rule.selection.selects:
            # The hidden states are detached, because the loss must not train the draft to change its scores.
            scores, all_losses = self._score(hidden.detach(), support, labels, columns or {})
        if scores is None:
            every = torch.ones(len(labels), device=hidden.device)
            chosen = Chosen(weights=every, kept=every > 0, threshold=every.new_tensor(torch.nan))
        else:
            chosen = choose(self.rule, scores, documents, others)
        # Rows with weight 0 are dropped before the head, so that the head computes nothing for them.
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
            **({} if is_counted else _loss_sums(losses if all_losses is None else all_losses)),
        }

    @torch.no_grad()
    def scores(
        self,
        input_ids: Tensor,
        rows: Tensor,
        labels: Tensor,
        **batch: Any,  # noqa: ANN401
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the scores of a micro-batch's rows, without a gradient.

        Args:
            input_ids: See `forward`.
            rows: See `forward`.
            labels: See `forward`.
            **batch: Other arguments of `forward`. Arguments that do not affect the scores are ignored.

        Returns:
            The scores, float32 [N]; and the sums from `_loss_sums`, or an empty dict if the selection needs no values
            of the draft. If `forward` is given the scores, it leaves these sums out of its own result.
        """
        support = _support(*(batch.get(name) for name in ("token_ids", "probs", "tail", "weights", "entropy")))
        hidden = input_ids.new_zeros(0)
        if self.rule.selection.looks:
            hidden = self.split.hidden(input_ids, batch.get("position_ids")).flatten(0, 1).index_select(0, rows)
        scores, all_losses = self._score(hidden, support, labels, batch.get("columns") or {})
        return scores, {} if all_losses is None else _loss_sums(all_losses)

    def _score(
        self, hidden: Tensor, support: Support | None, labels: Tensor, columns: dict[str, Tensor]
    ) -> tuple[Tensor, RowLosses | None]:
        """Returns the scores of N rows, and the losses of these rows (None if the selection needs no draft values)."""
        selection = self.rule.selection
        if selection.score is None:
            raise ValueError("selection must score rows, got one that keeps every row; call forward without scores")
        values, all_losses = dict(columns), None
        if selection.looks:
            found, all_losses = look_at_rows(self.split, hidden, support, labels, selection.looks)
            values |= found
        return selection.score(Candidates(support=support, values=values)).float(), all_losses

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Turns on activation checkpointing in the draft's layers. The `Trainer` of transformers calls this method.

        Args:
            activation_checkpointing_kwargs: Passed to the draft's method of the same name.
            every_n_layers: Passed to the draft's method.
            offload: Passed to the draft's method.
        """
        self.draft.activation_checkpointing_enable(
            activation_checkpointing_kwargs=activation_checkpointing_kwargs,
            every_n_layers=every_n_layers,
            offload=offload,
        )


def _support(
    token_ids: Tensor | None, probs: Tensor | None, tail: Tensor | None, weights: Tensor | None, entropy: Tensor | None
) -> Support | None:
    """Returns the target's rows of a batch as one `Support`; None if the batch has no rows of a target."""
    if token_ids is None or probs is None or tail is None:
        return None
    return Support(token_ids=token_ids, probs=probs, tail=tail, weights=weights, drawn_entropy=entropy)


def _loss_sums(losses: RowLosses) -> dict[str, Tensor]:
    """Returns float32 scalars for the log: sums over the rows whose losses were computed.

    Losses are computed for all rows if the selection needs values of the draft, else for the rows that are trained on.

    known: number of rows whose losses were computed.
    label_nll: sum of the label's negative logprob under the draft, in nats.
    kl, alpha: sum of KL(p‖draft) in nats, and sum of the acceptance rates in speculative sampling; only with a target.
    """
    found = {"known": losses.label_nll.new_tensor(len(losses.label_nll)), "label_nll": losses.label_nll.sum()}
    if losses.kl is not None and losses.alpha is not None:
        found |= {"kl": losses.kl.sum(), "alpha": losses.alpha.sum()}
    return found


def _statistics(chosen: Chosen, scores: Tensor | None, trained: RowLosses, weights: Tensor) -> dict[str, Tensor]:
    """Returns scalars for the log, which may be summed over micro-batches and ranks. Losses are in nats.

    rows, kept: number of rows, and number of kept rows.
    weight, objective: sum of the weights, and sum of the weighted losses.
    trained, kept_kl: number of rows that are trained on, and sum of KL(p‖draft) over them (kept_kl only with a target).

    If the selection scores rows, also:
    scored, score, score_squared, score_kept: number of scores, sum of all scores, sum of their squares, and sum of the
        scores of kept rows.
    threshold, thresholds: the threshold, and the number 1; both are 0 if the rule has no threshold. After summation,
        threshold / thresholds is the mean threshold.
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
            # Float64, because rounding in float32 sums would hide the standard deviation of nearly equal scores.
            "score": scores.double().sum(),
            "score_squared": scores.double().square().sum(),
            "score_kept": scores[chosen.kept].sum(),
            "threshold": chosen.threshold.nan_to_num(),
            "thresholds": chosen.threshold.isfinite().float(),
        }
    return found
