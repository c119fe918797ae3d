"""Where a draft comes from: loaded, made from a configuration, cut from a larger model, or adapted by LoRA."""
