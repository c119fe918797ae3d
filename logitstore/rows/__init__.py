"""Rows and shards in memory, as NumPy arrays, and their encoding."""
