"""Checkpoints on disk: files in, tensors out, and the way back."""
