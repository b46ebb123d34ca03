"""Show a run: metrics, loggers, progress, pictures, memory, environment."""

from bd3_scale.lazy import lazy_names

__getattr__, __dir__ = lazy_names(__name__)
