"""A network run block by block, on its own inputs."""
