"""The typed recipe of a run: schema, loading, cross-field checks."""

from bd3_scale.lazy import lazy_names

__getattr__, __dir__ = lazy_names(__name__)
