"""The sweep over contiguous blocks of layers, and which layers to drop first."""
