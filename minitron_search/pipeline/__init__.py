"""The stages top to bottom, one file a stage."""
