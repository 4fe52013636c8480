"""Kernels in the Triton language, each beside the plain formula that it replaces (in its docstring)."""
