"""Objectives that a language model wrote: the seven that DiscoPOP reports (Lu et al., 2024, arXiv 2406.08414).

They are kept as found, flaws included, so that claims about them can be tested. Three versions exist: the code that
the search found and trained (``found``), the formulas of the paper's appendix E (``paper``) and the code released as
corrected (``released``). At the search's own β = 0.05 they mostly agree; elsewhere they do not. Where they differ, an
option ``variant`` says which one is meant.

Throughout: ρ is the DPO margin, z = βρ, L(z) = log(1 + e^-z), H(z) = max(0, 1 - z), E(z) = e^-z, and τ = 0.05.
"""
