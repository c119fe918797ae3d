"""Estimates the cost of a dump before it runs: documents, bytes, hours and price."""
