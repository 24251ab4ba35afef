"""What is stored of a full step, and what a cached step predicts from it."""
