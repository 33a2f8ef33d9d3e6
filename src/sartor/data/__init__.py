"""Rows of any usual shape to nouns, nouns to token trees, token trees to flat batches."""
