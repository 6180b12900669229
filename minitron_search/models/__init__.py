"""Decoder models: family tables, architectures, where models come from, loading, the output head, devices."""
