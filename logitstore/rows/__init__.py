"""Rows and shards in memory as NumPy arrays, and their encoding into stored arrays. Nothing here does I/O."""
