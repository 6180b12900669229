"""What makes the default run work with a package index alone: a teacher, text and pairs of sentences."""
