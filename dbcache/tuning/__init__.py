"""Find a schedule for a model: which steps to run in full, and how to predict the others."""
