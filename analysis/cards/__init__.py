"""The report's cards: one file each, from a run's data to figures and tables."""
