"""Kernels for the CPU: compiled by Numba, or packed matrices from oneDNN through PyTorch."""
