"""Compute attention under the block diffusion mask: spans, training of both streams, and decoding."""

from bd3_scale.lazy import lazy_names

__getattr__, __dir__ = lazy_names(__name__)
