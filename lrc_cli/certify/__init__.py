"""Somebody's copy of a checkpoint is measured beside its original, and certified or flagged."""
