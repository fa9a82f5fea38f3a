"""Level three of `lrc verify`: everything measured is measured again."""
