"""Provide noise schedules, counter-based noise, the NELBO and the search of clipped intervals."""

from bd3_scale.lazy import lazy_names

__getattr__, __dir__ = lazy_names(__name__)
