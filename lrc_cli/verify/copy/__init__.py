"""The certificate of a copy is checked here: its files, both checkpoints, weights and values."""
