"""Trains drafts for speculative decoding, and measures their acceptance rates.

Training reads the target's distributions from logitstore stores, so the target model itself is not needed.
"""

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
