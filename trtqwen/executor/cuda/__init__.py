"""The embedded engine on CUDA: fused kernels in the Triton language, CUDA graphs, and direct upload of weights."""
