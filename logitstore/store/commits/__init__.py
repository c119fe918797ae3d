"""Commit records and the protocol that makes exactly one attempt of a shard exist."""
