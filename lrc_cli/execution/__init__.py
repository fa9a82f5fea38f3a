"""A network run block by block."""
