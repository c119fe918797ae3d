"""A store as a whole: opening, reading, writing, and taking back shards."""
