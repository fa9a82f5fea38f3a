"""Phase one, data: Gram matrices of every layer."""
