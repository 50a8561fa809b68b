"""Engines, which run a task: forward and backward, gradient exchange, the optimiser's step, and its state."""
