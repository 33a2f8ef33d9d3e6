"""Objectives as pure functions. Each file is one family; a file imports torch, ``sartor.types`` and ``stable`` only."""
