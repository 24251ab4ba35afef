"""Skipping single blocks (DBPrune, and the last blocks of a stack)."""
