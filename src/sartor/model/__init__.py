"""Loading, the forward pass over trees, log-probabilities and the cached reference."""
