"""From text to batches: tokenisers, preparation into MDS shards, and exact reading of them."""

from bd3_scale.lazy import lazy_names

__getattr__, __dir__ = lazy_names(__name__)
