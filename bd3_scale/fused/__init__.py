"""Compute what lies between a layer's matrix products, in fused passes over memory.

These are the activation, the residual sum with its norm, the norm and rotation of heads, and the cross-entropy of the
output head. On a GPU they are limited by memory and not by arithmetic: each kernel reads and writes its tensors once.
"""
