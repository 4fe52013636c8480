"""Estimates of a recipe's memory, concurrency and speed, without a GPU."""
