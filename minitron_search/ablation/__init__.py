"""Ablations: several arms, each a run, compared at equal parameters, tokens and seeds."""
