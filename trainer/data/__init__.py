"""Turns stores into batches: packs and orders the documents, divides the packs among ranks, and reads their shards.

This package contains no code that depends on a model.
"""
