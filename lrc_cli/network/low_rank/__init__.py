"""This folder has the modules of layers that are not stored densely, and puts them in place."""
