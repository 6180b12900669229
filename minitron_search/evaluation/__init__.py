"""Scores of a model, benchmarks by lm-eval, and the statistics that compare models."""
