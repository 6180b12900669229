"""Structured compression of language models: search, prune, distil and prove it, on Ray."""

__version__ = "0.1.0"
