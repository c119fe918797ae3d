"""Objectives, selections, and the fused head that computes both without the logits of a batch."""
