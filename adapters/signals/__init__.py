"""What policies without a probe look at."""
