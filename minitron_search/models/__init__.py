"""Decoder models: family tables, architectures, loading, the output head, devices."""
