"""Check and forecast a run before anything is spent."""
