"""Commit records, and the protocol by which exactly one of several attempts to write a shard succeeds."""
