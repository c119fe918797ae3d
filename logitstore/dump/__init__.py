"""Fills the layers of a store. Models run over the documents, and their rows or losses are written shard by shard."""
