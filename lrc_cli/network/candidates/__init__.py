"""This folder finds the layers that may be factorised, and says why other tensors may not."""
