"""Find the folder of a teacher by its name, the embedded one among them, and see whether its files are whole."""
