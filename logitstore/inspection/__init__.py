"""Inspects existing stores (contents, damage and fidelity), and exports shards."""
