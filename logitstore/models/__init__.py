"""Causal language models, shared by the dump and the trainer: loading, identity, and the split into backbone and head."""
