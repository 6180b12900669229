"""Let one process at a time write a run: who holds an output, here or in storage."""
