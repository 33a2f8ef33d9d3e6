"""Objectives as pure functions. Each file is one family; a file imports torch and ``sartor.types`` only."""
