"""Spans, attention of both streams under the block diffusion mask, and decoding."""

from bd3_scale.lazy import lazy_names

__getattr__, __dir__ = lazy_names(__name__)
