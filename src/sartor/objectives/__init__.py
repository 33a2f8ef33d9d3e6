"""From the forward pass to an objective and back: what losses see, which they are, and whether they may be trusted."""
