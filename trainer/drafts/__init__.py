"""Makes the draft: loads it, initialises it, or cuts it from a larger model. Adds LoRA if the options ask for it."""
