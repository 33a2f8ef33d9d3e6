"""What changed and how sure that is: preference accuracy, KL, win rates, diversity, intervals."""
