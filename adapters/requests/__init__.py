"""Which request, step and guidance branch a call belongs to."""
