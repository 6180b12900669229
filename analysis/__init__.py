"""Reads run directories and nothing else: tables, figures and the report. Imports neither torch nor Ray."""
