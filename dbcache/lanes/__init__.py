"""What is remembered from step to step, per block stack and guidance branch."""
