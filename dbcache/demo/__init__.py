"""The demo: a small trained model, drawn with and without the cache."""
