"""Steps recorded as CUDA graphs, with the decision inside."""
