"""Objectives, selections, and a fused LM head that computes both without the logits of a whole batch in memory."""
