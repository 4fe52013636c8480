"""Comparison of a checkpoint with its model: differences, and the limits for them."""
