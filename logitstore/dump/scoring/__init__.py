"""A model runs over the documents of a shard: rows, losses, and how faithful they are."""
