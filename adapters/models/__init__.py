"""The table of supported models."""
