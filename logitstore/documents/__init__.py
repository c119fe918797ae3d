"""Turns `--data` into the tokens layer: sources, records, tokens, loss masks. Loads no model."""
