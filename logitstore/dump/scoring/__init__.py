"""Runs models over a shard's documents. Computes the target's rows, other models' losses, and the fidelity of both."""
