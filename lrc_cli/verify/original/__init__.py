"""Level two of `lrc verify`: the original checkpoint beside the output."""
