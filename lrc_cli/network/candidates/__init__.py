"""Which layers may be factorised, and why the others may not."""
