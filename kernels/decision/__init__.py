"""Whether a step is cached: measure the change, decide on the device."""
