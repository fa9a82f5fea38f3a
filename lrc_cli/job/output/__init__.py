"""Packed factors become a finished directory here."""
