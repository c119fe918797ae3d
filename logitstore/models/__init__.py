"""Causal language models, used by the dump and the trainer: loading, identity, splitting into backbone and head."""
