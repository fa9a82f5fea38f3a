"""The factors are trained here, after they were fitted and before they are written."""
