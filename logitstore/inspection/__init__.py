"""Looks at a store that is there: its contents, its damage, its fidelity; and exports shards."""
