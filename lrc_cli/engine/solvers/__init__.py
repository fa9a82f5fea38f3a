"""Each file here holds one method, with the problem that it solves."""
