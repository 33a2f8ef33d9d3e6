"""The controlled experiment: DPO, and a reward model with PPO, from the same start and the same feedback."""
