"""A checkpoint as a module, and what its layers are."""
