"""What runs in place of a model's blocks."""
