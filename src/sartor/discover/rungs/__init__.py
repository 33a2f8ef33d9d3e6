"""The rungs of the race, each dearer and truer than the last, and what a candidate is judged by on all of them."""
