"""Trains drafts for speculative decoding from a logitstore, without the target, and measures their acceptance."""

from trainer.draft_trainer import DraftTrainer
from trainer.module import DraftModule
from trainer.objectives import OBJECTIVES
from trainer.selection import SELECTIONS
from trainer.stream import DocumentDataset

__all__ = [
    "OBJECTIVES",
    "SELECTIONS",
    "DocumentDataset",
    "DraftModule",
    "DraftTrainer",
]
