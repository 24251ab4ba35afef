"""Steps of several lanes at once: one launch for the rows of a batch, each with a lane of its own."""
