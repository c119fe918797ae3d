"""Fills the layers of a store: a model runs over the documents, and its rows or losses are written shard by shard."""
