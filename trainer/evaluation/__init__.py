"""Acceptance rate of a draft, measured from the cache, on held-out documents, or by speculative decoding."""
