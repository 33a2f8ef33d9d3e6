"""Objectives as typed expression trees: parsed and never executed, printed, compiled to stable tensor code."""
