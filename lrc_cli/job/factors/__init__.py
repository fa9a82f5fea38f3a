"""Phase two makes the factors of every layer."""
