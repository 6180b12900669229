"""Teachers: their names to folders, the embedded one, and whether their files are whole."""
