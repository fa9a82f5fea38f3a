"""Two networks compared, and what may be said of the difference."""
