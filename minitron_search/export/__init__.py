"""The student folder that a user takes away: weights, model card, engine compatibility."""
