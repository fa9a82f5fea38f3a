"""Two networks are compared here, and it is decided what may be said of the difference."""
