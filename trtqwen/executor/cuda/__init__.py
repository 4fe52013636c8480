"""The embedded engine on CUDA: fused kernels in the Triton language, CUDA graphs, weights straight to the card."""
