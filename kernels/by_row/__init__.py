"""Steps of several lanes in one launch: the rows of a batch, each with a lane of its own."""
