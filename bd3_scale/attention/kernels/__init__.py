"""Triton kernels of the two-stream attention, forward and backward, and of decoding."""
