"""Checkpoints in and out: import, export for serving, smaller formats."""

from bd3_scale.lazy import lazy_names

__getattr__, __dir__ = lazy_names(__name__)
