"""Attention and messages across ranks."""
