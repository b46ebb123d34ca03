"""Compute two-stream attention, forward and backward, and decoding, with Triton kernels."""
