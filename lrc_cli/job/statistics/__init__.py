"""Phase one reads the data here and sums Gram matrices of every layer."""
