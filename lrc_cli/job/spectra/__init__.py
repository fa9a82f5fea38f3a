"""Phase one, eigenproblems: every layer at every rank, and the ranks that are granted."""
