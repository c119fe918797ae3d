"""Makes the draft: loads it, initialises it from a configuration, or cuts it from a larger model; can add LoRA."""
