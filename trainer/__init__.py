"""Trains drafts for speculative decoding from a logitstore, without the target, and measures their acceptance."""

from trainer.data.dataset import DocumentDataset
from trainer.loop.draft_trainer import DraftTrainer
from trainer.loss.draft_module import DraftModule
from trainer.loss.objectives import OBJECTIVES
from trainer.loss.selection import SELECTIONS

__all__ = [
    "OBJECTIVES",
    "SELECTIONS",
    "DocumentDataset",
    "DraftModule",
    "DraftTrainer",
]
