"""Read the checkpoints of a training, and run nothing that is in them."""
