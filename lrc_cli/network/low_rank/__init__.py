"""The low-rank modules, and how a loader puts them in place."""
