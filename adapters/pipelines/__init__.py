"""Calls of a pipeline as requests, and the cache switched on and off."""
