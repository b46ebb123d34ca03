"""Compute what lies between a layer's matrix products, with Triton kernels."""
