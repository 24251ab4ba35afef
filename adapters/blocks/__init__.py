"""What a block takes and returns, and where a model keeps its blocks."""
