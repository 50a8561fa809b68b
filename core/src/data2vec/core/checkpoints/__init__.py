"""Checkpoints: complete or absent, and the same for every engine and number of ranks."""
