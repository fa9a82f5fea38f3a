"""The solvers: one method a file, with the problem that it solves."""
