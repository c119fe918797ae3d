"""Computes the sizes of Ray workers, and runs functions on them."""
