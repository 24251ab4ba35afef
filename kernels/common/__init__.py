"""What all kernels share: choice of implementation, sums, launches, the state of a lane."""
