"""The training engine: from pairs to a checkpoint, one optimizer step after the other."""
