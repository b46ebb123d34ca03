"""Triton kernels of what stands between a layer's products."""
