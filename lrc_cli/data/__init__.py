"""Data files, and the sequences of model inputs that are drawn from them."""
