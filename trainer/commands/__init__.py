"""Commands of the trainer: `logitstore train` and `logitstore evaluate`."""
