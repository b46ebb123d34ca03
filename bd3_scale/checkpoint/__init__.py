"""Save, load and verify sharded checkpoints, which any number of ranks may read; they are complete or absent."""

from bd3_scale.lazy import lazy_names

__getattr__, __dir__ = lazy_names(__name__)
