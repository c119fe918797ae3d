"""Turns `--data` into the `tokens` layer: finds and reads records, tokenises them, makes loss masks. Loads no model."""
