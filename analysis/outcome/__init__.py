"""The cards of what came out of a run: the student beside its teacher, in scores, shape, words and benchmarks."""
