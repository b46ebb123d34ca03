"""Import checkpoints of other software, and export checkpoints for serving and in smaller formats."""

from bd3_scale.lazy import lazy_names

__getattr__, __dir__ = lazy_names(__name__)
