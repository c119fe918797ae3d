"""Acceptance rate of a draft, measured from the cache, on held-out documents and by speculative decoding."""
