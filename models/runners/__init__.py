"""Ways to run a model over pages: packed, padded, recurrent."""
