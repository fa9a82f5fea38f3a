"""Phase one solves eigenproblems here: every layer at every rank, then the granted ranks."""
