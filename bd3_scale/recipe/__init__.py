"""Define, load and check the typed recipe of a run."""

from bd3_scale.lazy import lazy_names

__getattr__, __dir__ = lazy_names(__name__)
