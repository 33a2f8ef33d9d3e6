"""Tasks whose true score is known, so that what training did to a model can be checked."""
