"""The training loop, its exact resume, and its checkpoints."""
