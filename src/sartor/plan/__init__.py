"""What a run will cost, before it runs: a trace without weights for work and memory, a probe for time."""
