"""Fills the layers of a store: runs models over the documents, and writes the rows or losses shard by shard."""
