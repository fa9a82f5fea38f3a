"""One budget, shared between layers."""
