"""A checkpoint as a module, its layers, and the low-rank modules that take their place."""
