"""A trial: an architecture, its settings and a seed, run from the trim to its last rung."""
