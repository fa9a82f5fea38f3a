"""Level one of `lrc verify`: the written files alone."""
