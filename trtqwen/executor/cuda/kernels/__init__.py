"""Kernels in the Triton language, each with the plain formula that it replaces (in its docstring)."""
