"""The search: legal architectures, samplers, the schedule of rungs, and its state."""
