"""The loop (accumulate, clip, step, log, save, resume), then one file per algorithm."""
