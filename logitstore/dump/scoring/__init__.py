"""Runs models over the documents of a shard. Computes the target's rows, other models' losses, and their fidelity."""
