"""Say things to people: lines of a run, what went wrong, and text of others made harmless."""
