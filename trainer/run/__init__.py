"""One training run: its options, its output folder, its model card."""
