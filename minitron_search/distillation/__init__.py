"""The training loop, the teacher it asks, its cache, teacher correction and checkpoints."""
