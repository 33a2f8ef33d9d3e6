"""Anything that scores a completion: ``score(prompts, completions, **columns) -> list[float]``."""
