"""Causal language models, shared by dump and trainer: loading, identity, the split into backbone and head."""
