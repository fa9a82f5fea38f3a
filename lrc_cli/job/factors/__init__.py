"""Phase two: the factors of every layer."""
