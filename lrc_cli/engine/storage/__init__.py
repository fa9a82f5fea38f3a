"""Forms in which a layer is stored: one form a file."""
