"""Kernels in Triton, for GPUs; their tests run in Triton's interpreter where there is no GPU."""
