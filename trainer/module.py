"""DraftModule: a draft whose forward pass is the loss of a micro-batch: what data-parallel wrappers wrap."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from logitstore.causal_lm import SplitLM
from logitstore.support import Support
from trainer.head import selected_losses

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from trainer.objectives import Objective
    from trainer.selection import Selection


class DraftModule(nn.Module):
    """A draft whose forward pass is the whole loss, so that DistributedDataParallel wraps what is differentiated.

    Attributes:
        draft: The Hugging Face model; its vocabulary keeps its padding.
        reads_reference: Whether batches must hold the reference's losses.
    """

    def __init__(
        self,
        draft: PreTrainedModel,
        *,
        vocab_size: int,
        objective: Objective,
        selection: Selection,
        keep: float,
        denominator: Literal["kept", "masked"],
    ) -> None:
        super().__init__()
        self.draft = draft
        self.split = SplitLM(draft, vocab_size)
        self.reads_reference = selection.needs_losses
        self._objective = objective
        self._selection = selection
        self._keep = keep
        self._denominator = denominator

    def forward(
        self,
        input_ids: Tensor,
        rows: Tensor,
        token_ids: Tensor,
        probs: Tensor,
        tail: Tensor,
        labels: Tensor,
        weights: Tensor | None = None,
        drawn_entropy: Tensor | None = None,
        reference_ce: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Computes the loss of one micro-batch, laid out by `trainer.stream.collate`.

        Returns:
            loss: Scalar, with gradient: the sum over the kept rows divided by their number or by that of all rows.
            The rest are scalars without gradient, to be summed over micro-batches: kept and known rows, the sums of
            KL(p‖draft) and of the label's negative logprob over the known rows, and the selection's threshold.
        """
        hidden = self.split.hidden(input_ids).flatten(0, 1).index_select(0, rows)
        support = Support(
            token_ids=token_ids, probs=probs, tail=tail, weights=weights, drawn_entropy=drawn_entropy
        )
        result = selected_losses(
            self.split,
            hidden,
            support,
            labels,
            reference_ce,
            objective=self._objective,
            selection=self._selection,
            keep=self._keep,
            generator=torch.default_generator,  # Trainer saves its state in checkpoints and restores it
        )
        losses, known = result.objective, result.known
        divisor = len(losses) if self._denominator == "kept" else len(support)
        kl = known.ce - result.known_support.entropy()
        return {
            "loss": losses.sum() / max(1, divisor),
            "kept": losses.new_tensor(len(losses)),
            "known": losses.new_tensor(len(kl)),
            "kl": kl.sum(),
            "label_nll": known.label_nll.sum(),
            "threshold": result.selected.threshold.nan_to_num(),
            "thresholds": result.selected.threshold.isfinite().float(),
            "denominator": losses.new_tensor(divisor),
        }

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
