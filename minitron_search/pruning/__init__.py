"""Rankings, trimming a teacher to a smaller architecture, and LaCo's merged layers."""
