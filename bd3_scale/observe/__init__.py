"""What a person sees of a run: metrics, progress, loss curve, memory, environment."""

from bd3_scale.lazy import lazy_names

__getattr__, __dir__ = lazy_names(__name__)
