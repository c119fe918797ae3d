"""Acceptance of a draft: from the cache, on held-out documents, and by real speculative decoding."""
